"""Guidance by random conditions (ICG), and annealed conditions (CADS)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.types import ConditionSpec, Denoised, Text, class_labels
from diffusion.sampling.guidance import cads, cfg, icg
from tests.refusals import refused
from tests.sampling.guidance.closed_form import TIMES, X, arguments_of, close, model, x0_of

KEYS = jax.random.split(jax.random.key(0), 4)
LABELS = class_labels(5)
NUM, SIZE = 3, 20_000
RNG = np.random.default_rng(1)


def drawn(conditions, cond, num, t=0.35, keys=None):
    """Returns the conditions of the second rows of an evaluation of `icg`."""
    keys = jax.random.split(jax.random.key(1), num) if keys is None else keys
    calls = []
    icg(lambda x, t, cond: calls.append(cond) or Denoised(x), 3.0, keys=keys, conditions=conditions)(
        jnp.zeros((num, 2)), t, cond
    )
    (found,) = calls
    for given, first in zip(
        jax.tree.leaves(cond), jax.tree.leaves(jax.tree.map(lambda v: v[0::2], found)), strict=True
    ):
        np.testing.assert_array_equal(given, first)
    return jax.tree.map(lambda value: value[1::2], found)


# Independent condition guidance.


@pytest.mark.parametrize("t", TIMES, ids=["scalar", "per-example"])
def test_icg_formula(t):
    """arXiv 2407.02687: the unconditional prediction is replaced by that with an independent condition."""
    cond = {"label": np.array([0, 1, 2, 3])}
    method = lambda denoise: icg(denoise, 3.0, keys=KEYS, conditions=LABELS)  # noqa: E731
    x, _, given = arguments_of(method, cond, t)
    assert x.shape[0] == 8 and np.all(given.get("keep", True))
    conditional, independent = (np.float64(x0_of(X, t, given["label"][rows::2])) for rows in (0, 1))
    found = method(model)(X, t, cond)
    close(found.x0, independent + 3 * (conditional - independent))
    close(found.conditional, np.float64(x0_of(X, t, cond["label"])))


def test_random_labels_are_uniform_and_independent_of_the_given_ones():
    given = np.arange(SIZE) % 5
    labels = np.asarray(drawn(LABELS, {"label": given}, SIZE)["label"])
    table = np.zeros((5, 5))
    np.add.at(table, (given, labels), 1)
    expected = SIZE / 25
    assert np.sum((table - expected) ** 2) / expected < 60  # chi squared with 24 degrees of freedom


def test_random_conditions_differ_between_times_and_samples_and_not_between_batches():
    labels = {"label": np.zeros(64, int)}
    keys = jax.random.split(jax.random.key(2), 64)
    first = drawn(LABELS, labels, 64, keys=keys)["label"]
    np.testing.assert_array_equal(first, drawn(LABELS, labels, 64, keys=keys)["label"])
    assert (first != drawn(LABELS, labels, 64, t=0.36, keys=keys)["label"]).any()
    half = drawn(LABELS, {"label": labels["label"][32:]}, 32, keys=keys[32:])["label"]
    np.testing.assert_array_equal(half, first[32:])


def test_random_vectors_and_texts_have_the_statistics_of_the_given_ones():
    conditions = {
        "vector": ConditionSpec("vector", (SIZE,)),
        "words": ConditionSpec("text", (SIZE,), vocabulary=7, pooled=SIZE),
    }
    mean, std = np.float32([[1.0], [-2.0], [0.0]]), np.float32([[0.5], [2.0], [1.0]])
    values = mean + std * RNG.normal(size=(NUM, SIZE)).astype(np.float32)
    text = Text(np.zeros((NUM, SIZE), int), np.ones((NUM, SIZE), bool), values[::-1])
    found = drawn(conditions, {"vector": values, "words": text}, NUM)
    for array, like in ((found["vector"], values), (found["words"].pooled, values[::-1])):
        np.testing.assert_allclose(array.mean(axis=1), like.mean(axis=1), atol=0.05)
        np.testing.assert_allclose(array.std(axis=1), like.std(axis=1), rtol=0.03)
        assert abs(np.mean((array - array.mean()) * (like - like.mean()), axis=1)).max() < 3.2  # of means, no more
        assert np.corrcoef(array[0], like[0])[0, 1] < 0.03
    assert np.corrcoef(found["vector"][0], found["words"].pooled[2])[0, 1] < 0.03
    counts = np.bincount(np.ravel(found["words"].tokens), minlength=7)
    assert len(counts) == 7 and abs(counts / counts.mean() - 1).max() < 0.06


def test_random_texts_ignore_the_padding():
    conditions = {"text": ConditionSpec("text", (SIZE, 1), pooled=SIZE)}
    tokens, mask = RNG.normal(2.0, 0.1, size=(NUM, SIZE, 1)).astype(np.float32), np.arange(SIZE) < SIZE // 2
    tokens[:, ~mask] = 1e6
    text = drawn(conditions, {"text": Text(tokens, np.tile(mask, (NUM, 1)), tokens[:, ::-1, 0])}, NUM)["text"]
    found = text.tokens
    assert abs(np.corrcoef(found[0, :, 0], text.pooled[0])[0, 1]) < 0.03
    np.testing.assert_allclose(found.mean(axis=(1, 2)), 2.0, atol=0.01)
    np.testing.assert_allclose(found.std(axis=(1, 2)), 0.1, rtol=0.03)


@pytest.mark.parametrize("conditions", [{}, {"size": ConditionSpec("scalar")}])
def test_icg_requires_conditions_that_it_can_draw(conditions):
    with refused("name"):
        icg(model, keys=KEYS, conditions=conditions)


# Condition-annealed sampling.

VECTOR = {"vector": ConditionSpec("vector", (SIZE,))}
BOTH = [VECTOR, LABELS]
VALUES = np.float32([[1.0], [-2.0], [0.0], [3.0]]) + RNG.normal(size=(4, SIZE)).astype(np.float32)


def annealed(t, conditions=VECTOR, cond=None, keys=KEYS, **options):
    """Returns the conditions that the denoiser receives from `cads`, with what becomes of `VALUES` as `vector`.

    If the condition is a label, `VALUES` are the embeddings of the labels.
    """
    calls = []
    cond = {"vector": VALUES, "label": np.arange(4)} if cond is None else cond
    denoise = cads(lambda x, t, cond: calls.append(cond) or Denoised(x), keys=keys, conditions=conditions, **options)
    denoise(jnp.zeros((len(keys), 2)), t, cond)
    (found,) = calls
    return {**found, "vector": found["label_noise"](VALUES)} if "label_noise" in found else found


@pytest.mark.parametrize("conditions", BOTH, ids=["vector", "label"])
@pytest.mark.parametrize("t", [0.65, 0.75, 0.9, 1.0, np.float32([0.5, 0.7, 0.8, 1.0])], ids=str)
def test_noisy_conditions(t, conditions):
    """Eq. 1 and 2 of arXiv 2310.17347: the share of the condition, and the variance of the noise."""
    gamma = np.broadcast_to(np.clip((0.9 - np.float64(t)) / 0.3, 0, 1), 4)
    found = np.float64(annealed(t, conditions, psi=0.0, noise_scale=0.5)["vector"])
    noise = found - np.sqrt(gamma)[:, None] * VALUES
    np.testing.assert_allclose(noise.std(axis=1), 0.5 * np.sqrt(1 - gamma), rtol=0.02, atol=1e-6)
    np.testing.assert_allclose(noise.mean(axis=1), 0, atol=0.02)
    correlations = [np.mean(a * b) for a, b in zip(noise, VALUES - VALUES.mean(axis=1, keepdims=True), strict=True)]
    np.testing.assert_allclose(correlations, 0, atol=0.03)
    others = np.corrcoef(noise[gamma < 1])
    assert abs(np.atleast_2d(others) - np.eye(len(np.atleast_2d(others)))).max() < 0.03


@pytest.mark.parametrize("conditions", BOTH, ids=["vector", "label"])
@pytest.mark.parametrize("psi", [0.3, 1.0])
def test_restored_statistics(psi, conditions):
    """Eq. 3 and 4: psi mixes the noisy condition with the one that has the mean and deviation of the original."""
    noisy, found = (np.float64(annealed(0.7, conditions, psi=value)["vector"]) for value in (0.0, psi))
    normal = (noisy - noisy.mean(axis=1, keepdims=True)) / noisy.std(axis=1, keepdims=True)
    restored = normal * VALUES.std(axis=1, keepdims=True) + VALUES.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(found, psi * restored + (1 - psi) * noisy, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("conditions", BOTH, ids=["vector", "label"])
def test_conditions_are_unchanged_at_low_noise(conditions):
    np.testing.assert_array_equal(annealed(0.599, conditions)["vector"], VALUES)
    np.testing.assert_array_equal(annealed(0.299, conditions, tau1=0.3, tau2=0.31)["vector"], VALUES)
    assert abs(annealed(0.601, conditions)["vector"] - VALUES).max() > 0.01


def test_texts_are_annealed_without_their_padding_and_other_conditions_stay():
    conditions = {"text": ConditionSpec("text", (8, 64), pooled=64), "size": ConditionSpec("scalar")}
    tokens, mask = RNG.normal(size=(4, 8, 64)).astype(np.float32), np.arange(8) < np.array([[8], [3], [5], [1]])
    pooled, size = RNG.normal(size=(4, 64)).astype(np.float32), np.float32([1, 2, 3, 4])

    def of(padding):
        text = Text(np.where(mask[..., None], tokens, padding), mask, pooled)
        return annealed(0.8, conditions, {"text": text, "size": size})

    found = of(0.0)
    for row, there in enumerate(mask):
        ours, given = np.asarray(found["text"].tokens)[row, there], tokens[row, there]
        np.testing.assert_allclose([ours.mean(), ours.std()], [given.mean(), given.std()], rtol=1e-3, atol=1e-4)
        assert abs(ours - given).max() > 0.1
    assert abs(found["text"].pooled - pooled).max() > 0.1
    np.testing.assert_array_equal(found["size"], size)
    np.testing.assert_array_equal(found["text"].tokens[mask], of(1e3)["text"].tokens[mask])


def test_the_unconditional_prediction_is_not_annealed():
    """The network replaces values that are not kept, in `cfg` around which `cads` is applied too."""

    def denoise(x, t, cond):
        return Denoised(jnp.where(cond["keep"][:, None], cond["vector"].mean(axis=1, keepdims=True), 7.0) + 0 * x)

    guided = cads(cfg(denoise, 0.0), psi=0.0, keys=KEYS, conditions=VECTOR)
    np.testing.assert_array_equal(guided(jnp.zeros((4, 2)), 1.0, {"vector": VALUES}).x0, 7.0)


def test_negative_labels_are_not_annealed():
    calls = []
    guided = cfg(lambda x, t, cond: calls.append(cond) or Denoised(x), 3.0, negative={"label": 4})
    cads(guided, keys=KEYS, conditions=LABELS)(jnp.zeros((4, 2)), 1.0, {"label": np.arange(4)})
    (found,) = calls
    np.testing.assert_array_equal(found["label"], [0, 4, 1, 4, 2, 4, 3, 4])
    np.testing.assert_array_equal(found["label_noise"].gamma, [0, 1] * 4)
    np.testing.assert_array_equal(*(jax.random.key_data(found["label_noise"].keys[rows::2]) for rows in (0, 1)))


@pytest.mark.parametrize(
    "conditions", [{}, {"size": ConditionSpec("scalar")}, {"words": ConditionSpec("text", (3,), vocabulary=5)}]
)
def test_cads_requires_conditions_with_noisy_values(conditions):
    with refused("conditions"):
        cads(model, keys=KEYS, conditions=conditions)
