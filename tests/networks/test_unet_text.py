"""The U-Net that reads texts: what affects its output, what does not, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core import trees
from diffusion.core.build import build_network
from diffusion.core.types import ArraySpec, ConditionSpec, Perturbation, Spec, Text, class_labels
from diffusion.layers.keys import Keys
from diffusion.layers.spatial_transformer import SpatialTransformer
from diffusion.networks.unet_text import guidance_features
from tests.refusals import refused

TINY = {"name": "unet_text", "width": 8, "channel_mult": (1, 1), "num_res_blocks": 1, "depth": (0, 1), "num_heads": 2,
        "number_features": 4, "guidance_features": 4, "groups": 4}  # fmt: skip
CONDITIONS = {
    **class_labels(3),
    "text": ConditionSpec("text", (5, 6), pooled=3),
    "time_ids": ConditionSpec("vector", (2,)),
    "image": ConditionSpec("image", (5, 6, 1)),
}
RNG = np.random.default_rng(0)
MASK = np.arange(5) < np.array([[5], [3], [1]])
X, C_NOISE = RNG.normal(size=(3, 5, 6, 2)).astype(np.float32), np.float32([999, 300, 10])  # an odd height
COND = {
    "label": np.array([0, 2, 1], np.int32),
    "text": Text(RNG.normal(size=(3, 5, 6)).astype(np.float32), MASK, RNG.normal(size=(3, 3)).astype(np.float32)),
    "time_ids": RNG.integers(1024, size=(3, 2)).astype(np.float32),
    "image": RNG.normal(size=(3, 5, 6, 1)).astype(np.float32),
    "guidance_scale": np.float32([1, 7.5, 3]),
}


def network_of(conditions=CONDITIONS, **options):
    """Returns a network, and parameters of which none is zero."""
    options = TINY | {"scalar_conditions": ("guidance_scale",)} | options
    network = build_network(options, Spec(ArraySpec((5, 6, 2), "latent"), conditions))
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return network, jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def apply_of():
    """Returns a function that compiles the network with a kernel; all arrays are its arguments."""

    @functools.cache
    def make(kernel):
        network, params = network_of(kernel=kernel)
        compiled = jax.jit(network.apply)
        return lambda cond=COND, params=params, x=X, c_noise=C_NOISE: compiled(params, x, c_noise, cond), params

    return make


def replaced(**fields):
    return {**COND, "text": dataclasses.replace(COND["text"], **fields)}


@pytest.mark.parametrize("kernel", ["xla", "chunked"])
def test_padding_never_changes_the_output(kernel, apply_of):
    apply, _ = apply_of(kernel)
    out = apply()
    for padding in (RNG.normal(size=(3, 5, 6)).astype(np.float32), np.float32(1e30), np.float32(np.nan)):
        padded = np.where(MASK[..., None], COND["text"].tokens, padding)
        np.testing.assert_array_equal(apply(replaced(tokens=padded)), out)
    others = {
        "the last token": replaced(tokens=np.where(np.arange(5)[:, None] == 2, 1, COND["text"].tokens)),
        "the mask": replaced(mask=np.arange(5) < np.array([[4], [2], [1]])),
    }
    for what, other in others.items():
        assert abs(apply(other) - out)[:2].max() > 1e-4, what


def test_every_condition_matters_and_the_position_in_the_batch_does_not(apply_of):
    apply, _ = apply_of("xla")
    out = apply()
    assert out.shape == X.shape and np.isfinite(out).all()
    others = {name: {**COND, name: COND[name] + 1} for name in ("time_ids", "image", "guidance_scale")}
    others["label"] = {**COND, "label": np.array([1, 1, 0], np.int32)}
    others["pooled"] = replaced(pooled=COND["text"].pooled + 1)
    for name, other in others.items():
        assert abs(apply(other) - out).max() > 1e-4, name
    order = np.array([2, 0, 1])
    x, c_noise, cond = jax.tree.map(lambda leaf: leaf[order], (X, C_NOISE, COND))
    np.testing.assert_allclose(apply(cond, x=x, c_noise=c_noise), out[order], atol=1e-5 * abs(out).max())


def test_without_keys_and_values_the_text_has_no_effect(apply_of):
    apply, params = apply_of("xla")
    flat = trees.by_path(params)
    zeros = {path: np.zeros_like(leaf) if "/cross/v/" in path or "/cross/k/" in path else leaf for path, leaf in
             flat.items()}  # fmt: skip
    other = replaced(tokens=COND["text"].tokens[::-1].copy())
    np.testing.assert_array_equal(apply(other, trees.nest(zeros)), apply(COND, trees.nest(zeros)))
    assert abs(apply(other, params) - apply(COND, params)).max() > 1e-4


def test_the_guidance_scale_is_embedded_as_by_latent_consistency_models():
    """Values of diffusers' pipelines, for a width of 256: sines, then cosines."""
    features = guidance_features(jnp.float32([7.5]), 256)[0]
    np.testing.assert_allclose(features[:3], [-0.04478, 0.76286, -0.87103], atol=2e-4)
    np.testing.assert_allclose(features[128:131], [-0.99900, 0.64656, 0.49123], atol=2e-4)


def test_a_text_that_is_dropped_needs_a_null():
    network, params = network_of()
    shapes = functools.partial(jax.eval_shape, network.apply, params, X, C_NOISE)
    keep = np.array([True, False, True])
    for dropped in ({"keep": keep}, {"keep": {"text": keep}}):
        with refused("network.text") as caught:
            shapes({**COND, **dropped})
        assert "null" in str(caught.value)
    assert shapes({**COND, "keep": {"label": keep, "image": keep}}).shape == X.shape
    assert shapes({**COND, "keep": keep, "null": {"text": COND["text"]}}).shape == X.shape


@pytest.mark.slow
def test_perturbed_transformers():
    """Only self-attention changes, in the transformers that are named; without `layers`, that in the middle."""
    network, params = network_of(channel_mult=(1,), depth=(1,))
    out, outs = network.apply(params, X, C_NOISE, COND), {}
    for layers in ((), (1,), (3,)):
        outs[layers] = network.perturbed(Perturbation("identity", layers))(params, X, C_NOISE, COND)
        assert abs(outs[layers] - out).max() > 1e-4
    np.testing.assert_array_equal(outs[()], outs[1,])
    assert abs(outs[1,] - outs[3,]).max() > 1e-4
    for perturbation in (Perturbation("identity", (4,)), Perturbation("skip", (0,))):
        with refused("layers"):
            network.perturbed(perturbation)


def test_a_transformer_is_the_identity_at_initialisation():
    options = dict(only_cross_attention=False, kernel="xla", remat="none", dtype=jnp.float32)
    transformer = SpatialTransformer(8, 6, 2, 1, 4, rngs=Keys(jax.random.key(0)), **options)
    x = jnp.asarray(X[..., :1]) * jnp.arange(1.0, 9)
    np.testing.assert_array_equal(transformer(x, COND["text"].tokens, MASK), x)


@pytest.mark.parametrize(
    ("options", "conditions", "field"),
    [
        ({"width": 7}, {}, "width"),
        ({"number_features": 5}, {}, "number_features"),
        ({"guidance_features": 0}, {}, "guidance_features"),
        ({"channel_mult": (), "depth": ()}, {}, "channel_mult"),
        ({"depth": (1,)}, {}, "depth"),
        ({"depth": (0, -1)}, {}, "depth"),
        ({"middle_depth": -1}, {}, "middle_depth"),
        ({"num_heads": 3}, {}, "num_heads"),
        ({"num_heads": (1, 2, 4)}, {}, "num_heads"),
        ({"num_heads": None}, {}, "num_heads"),
        ({"head_dim": 4}, {}, "num_heads"),
        ({"num_heads": None, "head_dim": 3}, {}, "head_dim"),
        ({"only_cross_attention": (True,)}, CONDITIONS, "only_cross_attention"),
        ({"only_cross_attention": True}, {}, "only_cross_attention"),
        ({"groups": 3}, {}, "groups"),
        ({"dropout": 1.0}, {}, "dropout"),
        ({}, {"text": CONDITIONS["text"], "more": CONDITIONS["text"]}, "name"),
        ({}, {"text": ConditionSpec("text", (5,), vocabulary=9)}, "name"),
        ({}, {"image": ConditionSpec("image", (4, 6, 1))}, "name"),
    ],
)
def test_bad_options(options, conditions, field):
    with refused(f"network.{field}"):
        network_of(conditions, **options)
