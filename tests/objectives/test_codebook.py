"""Codebooks that follow their latents by moving averages, and the restart of unused codes.

The formulas are tested in whole train steps of a linear autoencoder, whose latents are z = x A.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import Network
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from tests.objectives.test_autoencoder import CRITIC, NETWORKS, SHAPE, linear, objective_of
from tests.refusals import refused

CODES = np.array([[-1, 0, 0], [-0.2, 0, 0], [0.3, 0, 0], [1, 0, 0], [9, 9, 9], [-9, 9, 0]], np.float32)
START = {"A": jnp.array([[1.0, 0.5, -0.5]]), "last": {"kernel": jnp.array([[0.5], [0.5], [0.5]])},
         "quantize": {"embedding": {"embedding": jnp.asarray(CODES)}}}  # fmt: skip
NETWORK, K = Network(lambda key: START, linear("vq")), len(CODES)
AVERAGES = make_ema(decays=(0.5,), warmup=False)
BATCHES = [{"x": jax.random.normal(jax.random.key(number), (4, *SHAPE)), "cond": {}} for number in range(4)]


@functools.cache
def step_of(accumulate, **options):
    """Returns a jitted step. Its optimizer has weight decay for the parameters that do not opt out."""
    objective = objective_of(**options)
    optimizer = make_optimizer(steps=9, name="adamw", learning_rate=1e-2, weight_decay=0.5, clip=None)
    state = init_state(objective, NETWORK, optimizer, AVERAGES, jax.random.key(0))
    return objective, state, jax.jit(make_step(objective, NETWORK, optimizer, AVERAGES, seed=0, accumulate=accumulate))


def run(batches, accumulate=1, **options):
    """Returns the states before and after the steps, the codes of each step, and the metrics."""
    objective, state, step = step_of(accumulate, **options)
    states, codes, metrics = [state], [], []
    for batch in batches:
        prepared, _ = objective.before_step(state.params, {}, batch, state.objective_state, None, state.step)
        codes.append(codes_of(prepared))
        state, measured = step(state, batch)
        states.append(state)
        metrics.append(measured)
    return states, codes, metrics


def codes_of(networks):
    return np.asarray(networks["net"]["quantize"]["embedding"]["embedding"])


def latents(state, batch):
    return np.asarray(batch["x"], np.float64).reshape(-1, 1) @ np.asarray(state.params["net"]["A"], np.float64)


@pytest.mark.parametrize("decay", [0.9, 0.0])
def test_codes_are_moving_averages(decay):
    """The codes of a step follow from the batches before it and from nothing else, neither a gradient nor weight decay;
    with decay 0 they are the means of the last batch (k-means). Codes that were never used keep their values."""
    states, found, _ = run(BATCHES, codebook="ema", codebook_decay=decay, restart_threshold=0.0)
    codes, average, usage, sums = CODES, CODES, np.zeros(K), np.zeros((K, 3))
    for before, after, batch, codes_used in zip(states[:-1], states[1:], BATCHES, found, strict=True):
        average = (average + codes) / 2
        np.testing.assert_allclose(codes_used, codes, rtol=1e-5)
        np.testing.assert_array_equal(codes_of(after.params), codes_used)
        np.testing.assert_allclose(codes_of(after.ema["0.5"]), average, rtol=1e-5)
        z = latents(before, batch)
        nearest = np.eye(K)[((z[:, None] - codes) ** 2).sum(-1).argmin(-1)]
        usage = decay * usage + (1 - decay) * K * nearest.mean(0)
        sums = decay * sums + (1 - decay) * K * nearest.T @ z / len(z)
        smoothed = (usage + 1e-5) / (usage.mean() + 1e-5) * usage.mean()
        codes = np.where(usage[:, None] > 0, sums / np.maximum(smoothed, 1e-9)[:, None], codes)
        if decay == 0:
            used = nearest.any(0)
            np.testing.assert_allclose(codes[used], (nearest.T @ z)[used] / nearest.sum(0)[used, None], rtol=1e-4)
    assert usage[:4].all() and not usage[4:].any() and (abs(codes[:4] - CODES[:4]) > 0.1).any()


@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_unused_codes_restart(kind):
    """They become latents of the batch that did not use them, each a different one, once. A bad step in between changes
    nothing."""
    bad = {**BATCHES[0], "x": jnp.full((4, *SHAPE), jnp.nan)}
    options = {"codebook": kind, "codebook_decay": 0.5, "restart_threshold": 0.1}
    states, codes, metrics = run([BATCHES[0], bad, *BATCHES[1:]], **options)
    counts = [metrics[number]["restarted_codes"] for number in (0, 2, 3, 4)]
    np.testing.assert_array_equal(counts, [2, 0, 0, 0])
    distance = np.abs(codes[1][4:, None] - latents(states[0], BATCHES[0])).max(-1)
    np.testing.assert_array_less(distance.min(1), 1e-3)
    assert len(set(distance.argmin(1))) == 2
    np.testing.assert_array_equal(codes[1], codes[2])
    jax.tree.map(np.testing.assert_array_equal, states[1].objective_state, states[2].objective_state)
    assert (states[4].objective_state["usage"][4:] > 0.1).all()
    if kind == "gradient":  # no others are changed between two steps
        np.testing.assert_array_equal(codes[1][:4], codes_of(states[1].params)[:4])
        np.testing.assert_array_equal(codes[3], codes_of(states[3].params))


@pytest.mark.parametrize("num", [16, 20])
def test_a_codebook_starts_from_data(num):
    """All codes that the first batch does not use are dead, and there may be more of them than latents."""
    codebook, initial = objective_of(codebook="ema").codebook, jnp.full((num, 2), 5.0)
    z = jax.random.normal(jax.random.key(0), (1, 4, 4, 2))

    @jax.jit
    def first():
        state = codebook.initial_state(initial)
        after, metrics = codebook.update_state(state, z, jnp.zeros((1, 4, 4), int), jax.random.key(1))
        return codebook.codes(state, initial), codebook.codes(after, initial), metrics

    before, after, metrics = first()
    np.testing.assert_array_equal(before, initial)
    assert metrics["restarted_codes"] == num - 1
    distance = np.abs(np.asarray(after)[1:, None] - z.reshape(-1, 2)).max(-1)
    np.testing.assert_array_less(distance.min(1), 1e-3)
    assert len(set(distance.argmin(1))) == num - 1 or num > 16


@pytest.mark.parametrize("kind", ["gradient", "ema"])
def test_accumulation_and_players_change_nothing(kind):
    options = {"codebook": kind, "codebook_decay": 0.5, "restart_threshold": 0.1}
    expected, codes, _ = run(BATCHES, **options)
    for accumulate, players in ((2, {}), (1, {**CRITIC, "disc_start": 9})):
        states, found, _ = run(BATCHES, accumulate, **options, **players)
        np.testing.assert_allclose(found, codes, rtol=1e-4, atol=1e-5)
        for name, value in expected[-1].objective_state.items():
            np.testing.assert_allclose(states[-1].objective_state[name], value, rtol=1e-4, atol=1e-5)


def test_refusals():
    for kind, field, options in (
        ("fsq", "objective.codebook", {"codebook": "ema"}),
        ("kl", "objective.codebook", {"codebook": "ema"}),
        ("tiny", "objective.restart_threshold", {"restart_threshold": 0.1, **CRITIC}),
    ):
        network = build("networks", NETWORKS[kind], shape=SHAPE)
        with refused(field):
            jax.eval_shape(lambda: objective_of(**options).init(network, jax.random.key(0)))  # noqa: B023
    for name in ("codebook_decay", "restart_threshold"):
        for value in (-0.1, 1.0):
            with refused(f"objective.{name}"):
                objective_of(**{name: value})
