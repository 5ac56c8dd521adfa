"""Conditions other than labels: texts, vectors, images and numbers in every network that accepts them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.core import trees
from diffusion.core.build import build_network
from diffusion.core.types import ArraySpec, ConditionSpec, Perturbation, Spec, Text, class_labels
from diffusion.layers.conditioner import Conditioner
from diffusion.layers.embeddings import fourier
from tests.refusals import refused
from tests.tiers import slow_except

NETWORKS = {
    "unet": {"width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), "head_dim": 8},
    "dit": {"width": 16, "depth": 2, "num_heads": 2},
    "dit joint": {"name": "dit", "width": 16, "depth": 2, "num_heads": 2, "text": "joint", "positions": "rope"},
    "uvit": {"width": 16, "depth": 3, "num_heads": 2},
    "mlp": {"width": 8, "depth": 1},
}
CONDITIONS = {
    **class_labels(3),
    "text": ConditionSpec("text", (5, 6), pooled=4),
    "words": ConditionSpec("text", (3,), vocabulary=7),
    "pose": ConditionSpec("vector", (2,)),
    "edges": ConditionSpec("image", (8, 8, 2)),
    "score": ConditionSpec("scalar"),
}
MASK = np.arange(5) < np.array([[5], [3], [1]])
RNG = np.random.default_rng(0)
X, C_NOISE = RNG.normal(size=(3, 8, 8, 1)).astype(np.float32), np.float32([10, 300, 900])
COND = {
    "label": np.array([0, 2, 1], np.int32),
    "text": Text(RNG.normal(size=(3, 5, 6)).astype(np.float32), MASK, RNG.normal(size=(3, 4)).astype(np.float32)),
    "words": Text(RNG.integers(7, size=(3, 3)).astype(np.int32), MASK[:, :3]),
    "pose": RNG.normal(size=(3, 2)).astype(np.float32),
    "edges": RNG.normal(size=(3, 8, 8, 2)).astype(np.float32),
    "score": np.float32([1, 2, 3]),
}


def network_of(name, conditions, **options):
    """Returns a network, and parameters of which none is zero."""
    network = build_network({"name": name, **NETWORKS[name], **options}, Spec(ArraySpec((8, 8, 1)), conditions))
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return network, jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


def kept(**dropped):
    """Returns `keep` for all conditions, with those named dropped in the last example."""
    return {name: np.array([True, True, name not in dropped]) for name in CONDITIONS}


KERNELS = [(name, kernel) for name in ("unet", "dit", "dit joint", "uvit") for kernel in ("xla", "chunked")]


@pytest.mark.parametrize(
    ("name", "kernel"),
    slow_except([("unet", "xla"), ("dit", "chunked"), ("dit joint", "xla"), ("uvit", "chunked")], KERNELS),
)
def test_every_condition_matters_and_padding_does_not(name, kernel):
    network, params = network_of(name, CONDITIONS, kernel=kernel)
    apply = jax.jit(lambda cond, keep: network.apply(params, X, C_NOISE, {**cond, "keep": keep}))
    out = apply(COND, kept())

    def replaced(condition, **fields):
        return {**COND, condition: dataclasses.replace(COND[condition], **fields)}

    text, words = COND["text"], COND["words"]
    for padding in (RNG.normal(size=(3, 5, 6)).astype(np.float32), np.float32(1e30), np.float32(np.nan)):
        padded = np.where(MASK[..., None], text.tokens, padding)
        np.testing.assert_array_equal(apply(replaced("text", tokens=padded), kept()), out)
    padded = np.where(words.mask, words.tokens, 1000).astype(np.int32)
    np.testing.assert_array_equal(apply(replaced("words", tokens=padded), kept()), out)

    others = {
        "the last token": replaced("text", tokens=np.where(np.arange(5)[:, None] == 2, 1, text.tokens)),
        "the mask": replaced("text", mask=np.arange(5) < np.array([[4], [2], [1]])),
        "pooled": replaced("text", pooled=text.pooled + 1),
        "the order of words": replaced("words", tokens=words.tokens[:, ::-1].copy()),
        **{key: {**COND, key: COND[key] + 1} for key in ("pose", "edges", "score")},
    }
    for what, other in others.items():
        assert abs(apply(other, kept()) - out)[:2].max() > 1e-4, what

    for condition in CONDITIONS:  # a dropped value has no effect, and dropping one has
        dropped = apply(COND, kept(**{condition: True}))
        np.testing.assert_array_equal(dropped[:2], out[:2])
        assert abs(dropped[2] - out[2]).max() > 1e-4, condition
        changed = {**COND, condition: jax.tree.map(lambda value: value[::-1].copy(), COND[condition])}
        if condition in ("text", "words"):
            np.testing.assert_array_equal(apply(changed, kept(**{condition: True}))[2], dropped[2])
    empty = replaced("text", mask=MASK & (np.arange(3) < 2)[:, None])
    np.testing.assert_array_equal(apply(empty, kept()), apply(COND, kept(text=True)))

    in_reverse = jax.tree.map(lambda value: value[::-1].copy(), (X, C_NOISE, COND))
    moved = jax.jit(lambda x, c_noise, cond: network.apply(params, x, c_noise, cond))(*in_reverse)
    np.testing.assert_allclose(moved[::-1], out, atol=1e-5 * abs(out).max())


@pytest.mark.parametrize("name", slow_except(["dit"], ["unet", "dit", "uvit"]))
def test_the_previous_x0_is_0_unless_given_and_never_dropped(name):
    network, params = network_of(name, class_labels(3), self_conditioning=True)
    assert network.self_conditioning and not network_of(name, class_labels(3))[0].self_conditioning
    apply = jax.jit(lambda cond: network.apply(params, X, C_NOISE, {"label": COND["label"], **cond}))
    zero, some, dropped = {"previous_x0": 0 * X}, {"previous_x0": X}, {"keep": np.zeros(3, bool)}
    np.testing.assert_allclose(apply({}), apply(zero), atol=1e-5)
    assert abs(apply(some) - apply(zero)).max() > 1e-3
    assert abs(apply({**some, **dropped}) - apply({**zero, **dropped})).max() > 1e-3
    initial = {path for path, leaf in trees.by_path(network.init(jax.random.key(0))).items() if not leaf.any()}
    assert {"unet": "conv_images/kernel"}.get(name, "patches_images/kernel") in initial


def test_one_keep_drops_all_conditions():
    network, params = network_of("mlp", {name: CONDITIONS[name] for name in ("label", "pose", "score")})
    cond = {name: COND[name] for name in ("label", "pose", "score")}
    keep = np.array([True, False, True])
    out = network.apply(params, X, C_NOISE, {**cond, "keep": keep})
    np.testing.assert_array_equal(network.apply(params, X, C_NOISE, {**cond, "keep": dict.fromkeys(cond, keep)}), out)
    other = {"label": cond["label"][::-1], "pose": -cond["pose"], "score": 1 - cond["score"]}
    changed = network.apply(params, X, C_NOISE, {**other, "keep": keep})
    np.testing.assert_array_equal(changed[1], out[1])
    assert abs(changed - out)[::2].max() > 1e-3


@pytest.mark.parametrize("name", [pytest.param("unet", marks=pytest.mark.slow), "dit", "mlp"])
def test_a_network_can_start_from_one_without_the_conditions(name):
    """At initialisation they do not change the output."""
    names = ("label", "pose", "score") if name == "mlp" else tuple(CONDITIONS)
    plain, before = network_of(name, class_labels(3))
    network, _ = network_of(name, {key: CONDITIONS[key] for key in names})
    after = jax.jit(network.init)(jax.random.key(0))

    def merged(new, old):
        return {key: merged(new[key], old[key]) if isinstance(new[key], dict) else old[key] for key in old} | {
            key: new[key] for key in new.keys() - old.keys()
        }

    expected = jax.jit(plain.apply)(before, X, C_NOISE, {"label": COND["label"]})
    out = jax.jit(network.apply)(merged(after, before), X, C_NOISE, {key: COND[key] for key in names})
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize(
    ("network", "condition"),
    [
        ("mlp", ConditionSpec("text", (5, 6))),
        ("mlp", ConditionSpec("image", (8, 8, 1))),
        ("edm2", ConditionSpec("text", (5, 6))),
        ("dit", ConditionSpec("image", (8, 4, 1))),
    ],
)
def test_a_network_refuses_conditions_that_it_cannot_read(network, condition):
    with refused("network.name") as caught:
        build_network(network, Spec(ArraySpec((8, 8, 1)), {"extra": condition}))
    assert network in str(caught.value) and "'extra'" in str(caught.value)


@pytest.mark.parametrize("name", ["dit", "dit joint"])
def test_rotation_and_bfloat16_with_text(name):
    """Texts have no positions: the order of their tokens, and the place and the length of padding, have no effect."""
    conditions = {"text": CONDITIONS["text"]}
    options = {"dtype": "bfloat16", "positions": "rope", "qk_norm": True, "modulation": "single"}
    network, params = network_of(name, conditions, **options)
    text = COND["text"]
    in_reverse = Text(text.tokens[:, ::-1], text.mask[:, ::-1], text.pooled)
    apply = jax.jit(lambda text: network.apply(params, X, C_NOISE, {"text": text}))
    out = apply(text)
    assert out.dtype == jnp.float32 and np.isfinite(out).all() and abs(out).max() > 0.1
    np.testing.assert_allclose(apply(in_reverse), out, atol=1e-3 * abs(out).max())
    longer, _ = network_of(name, {"text": ConditionSpec("text", (8, 6), pooled=4)}, **options)
    padded = Text(np.pad(text.tokens, ((0, 0), (0, 3), (0, 0))), np.pad(text.mask, ((0, 0), (0, 3))), text.pooled)
    actual = jax.jit(longer.apply)(params, X, C_NOISE, {"text": padded})
    np.testing.assert_allclose(actual, out, atol=1e-3 * abs(out).max())
    other = dataclasses.replace(text, tokens=text.tokens + 1)
    assert abs(apply(other) - out).max() > 0.03 * abs(out).max()


def test_joint_text_is_not_blurred():
    """Its tokens are not among the rows and columns of the image."""
    network, params = network_of("dit joint", {"text": CONDITIONS["text"]})
    blurred = network.perturbed(Perturbation("blur", sigma=1.0))
    assert jax.eval_shape(blurred, params, X, C_NOISE, {"text": COND["text"]}).shape == X.shape


def test_without_a_null_text_it_cannot_be_dropped():
    """`cond["null"]` has to hold what replaces it; a text without any token gives finite values."""
    conditions = {"text": ConditionSpec("text", (5, 6))}
    network, params = network_of("dit", conditions, null_text=False, text_projection="mlp")
    assert not [path for path in trees.by_path(params) if "null" in path]
    cond = {"text": Text(COND["text"].tokens, MASK & (np.arange(3) < 2)[:, None])}
    assert np.isfinite(network.apply(params, X, C_NOISE, cond)).all()
    for keep in (np.array([True, True, False]), {"text": np.ones(3, bool)}):
        with refused("network.text"):
            network.apply(params, X, C_NOISE, {**cond, "keep": keep})
    network.apply(params, X, C_NOISE, {**cond, "keep": {"other": np.zeros(3, bool)}})
    network.apply(params, X, C_NOISE, {**cond, "keep": np.ones(3, bool), "null": cond})


def test_the_scale_of_fourier_features_reaches_the_network():
    options = dict(out_features=4, num_classes=0, kind="fourier", dtype=jnp.float32)
    small = Conditioner(8, scale=0.02, rngs=nnx.Rngs(0), **options)
    np.testing.assert_allclose(small.features(jnp.ones(1)), fourier(jnp.ones(1), 8, 0.02))
