"""DiT: parameter counts, its parts, and the effect of its options."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import ConditionSpec
from diffusion.layers.positions import rotary_angles, rotate, sincos_2d
from tests.refusals import refused
from tests.tiers import slow_except

TINY = {"name": "dit", "patch_size": 2, "width": 16, "depth": 3, "num_heads": 2}
PAPER = {"S": (384, 12, 6, 33), "B": (768, 12, 12, 130), "L": (1024, 24, 16, 458), "XL": (1152, 28, 16, 675)}


@functools.cache
def tiny(**options):
    """A small compiled DiT for digits, its initial parameters, and parameters of which none is zero."""
    network = build("networks", {**TINY, **options}, shape=(8, 8, 1), num_classes=10)
    fresh = jax.jit(network.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), fresh)
    return jax.jit(network.apply), fresh, params


X = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)
C_NOISE, COND = np.float32([10, 300, 900]), {"label": np.array([0, 3, 9])}


@pytest.mark.parametrize("size", slow_except(("S",), PAPER))
def test_the_papers_parameter_counts(size):
    width, depth, heads, millions = PAPER[size]
    spec = {"name": "dit", "patch_size": 2, "width": width, "depth": depth, "num_heads": heads, "outputs": 2}
    network = build("networks", spec, shape=(32, 32, 4), num_classes=1000)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6) == millions


def test_output_is_zero_at_initialisation():
    apply, fresh, _ = tiny()
    out = apply(fresh, X, C_NOISE, COND)
    assert out.shape == X.shape and out.dtype == jnp.float32 and not out.any()


def test_blocks_have_independent_initial_parameters():
    kernel = tiny()[1]["blocks"]["blocks"]["qkv"]["kernel"]
    assert kernel.shape == (3, 16, 48)
    assert abs(kernel[0] - kernel[1]).max() > 0.1
    # Xavier's bound depends on the fans of a single block.
    assert 0.95 < abs(kernel).max() / (6 / (16 + 48)) ** 0.5 <= 1


OPTIONS = [{}, {"positions": "rope"}, {"norm": "rms"}, {"qk_norm": True}, {"mlp": "swiglu"}, {"outputs": 2},
           {"dtype": "bfloat16"}, {"patch_size": 4}]  # fmt: skip
TOGETHER = {"positions": "rope", "norm": "rms", "qk_norm": True, "mlp": "swiglu", "outputs": 2, "patch_size": 4}


@pytest.mark.parametrize("options", slow_except([TOGETHER], [*OPTIONS, TOGETHER]), ids=str)
def test_every_input_matters(options):
    apply, _, params = tiny(**options)
    out = apply(params, X, C_NOISE, COND)
    assert out.shape == (3, 8, 8, options.get("outputs", 1)) and out.dtype == jnp.float32
    assert np.isfinite(out).all()
    for other in (
        apply(params, X[::-1], C_NOISE, COND),
        apply(params, X, C_NOISE + 100, COND),
        apply(params, X, C_NOISE, {"label": COND["label"][::-1]}),
        apply(params, X, C_NOISE, {**COND, "keep": np.array([False, False, False])}),
    ):
        assert abs(out - other).max() > 1e-3


def test_an_embedder_per_block():
    """With equal embedders the output is that of a shared one, and every block reads its own."""
    apply, _, params = tiny()
    separate = tiny(block_embedders=True)[0]
    copied = {**params, "embed": {"blocks": jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), params["embed"])}}
    out = separate(copied, X, C_NOISE, COND)
    np.testing.assert_allclose(out, apply(params, X, C_NOISE, COND), atol=1e-4 * abs(out).max())
    for index in range(3):
        changed = jax.tree.map(lambda leaf, index=index: leaf.at[index].add(0.3), copied["embed"])
        assert abs(separate({**copied, "embed": changed}, X, C_NOISE, COND) - out).max() > 1e-3


def test_examples_do_not_mix():
    apply, _, params = tiny()
    out = apply(params, X, C_NOISE, COND)
    others = (np.concatenate([a[:1], a[:0:-1]]) for a in (X, C_NOISE, COND["label"]))  # in reverse order
    x, c_noise, label = others
    other = apply(params, x, c_noise, {"label": label})
    np.testing.assert_allclose(other[:1], out[:1], atol=1e-4 * abs(out).max())
    assert abs(other[1:] - out[1:]).max() > 1e-3


@pytest.mark.parametrize("positions", slow_except(("rope",), ("sincos", "rope")))
def test_positions_matter(positions):
    """Exchanging two patches of the input does more than exchange them in the output."""
    apply, _, params = tiny(positions=positions)
    swapped = X.copy()
    swapped[:, :2, :2], swapped[:, 4:6, 2:4] = X[:, 4:6, 2:4], X[:, :2, :2]
    out, other = (np.array(apply(params, x, C_NOISE, COND)) for x in (X, swapped))
    back = other.copy()
    back[:, :2, :2], back[:, 4:6, 2:4] = other[:, 4:6, 2:4], other[:, :2, :2]
    assert abs(back - out).max() > 1e-3


def test_patches_are_squares_of_the_image():
    """With blocks that do nothing, a change of one patch affects only that patch."""
    apply, _, params = tiny()
    params = {**params, "blocks": jax.tree.map(jnp.zeros_like, params["blocks"])}
    changed = X.copy()
    changed[:, 2:4, 6:8] += 1
    before, after = (apply(params, x, C_NOISE, COND) for x in (X, changed))
    difference = abs(after - before).max((0, 3))
    assert (difference[2:4, 6:8] > 0).all()
    difference = np.array(difference)
    difference[2:4, 6:8] = 0
    assert not difference.any()


def test_program_size_does_not_depend_on_depth():
    def lines(depth):
        network = build("networks", {**TINY, "depth": depth}, shape=(8, 8, 1), num_classes=10)
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        return len(jax.jit(network.apply).lower(shapes, X, C_NOISE, COND).as_text().splitlines())

    assert lines(24) == lines(2)


def test_rotation_makes_products_relative(x64):
    """q at position a times k at position b depends only on a - b, in rows and in columns."""
    side, rng = 6, np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 8))
    angles = np.float64(rotary_angles(side, side, 8))
    q, k = (rotate(jnp.broadcast_to(x, (1, side**2, 1, 8)), angles)[0, :, 0] for x in (q, k))
    products = np.asarray(q @ k.T).reshape(side, side, side, side)
    np.testing.assert_allclose(products[1, 2, 3, 5], products[2, 1, 4, 4], rtol=1e-5)
    assert abs(products[1, 2, 3, 5] - products[1, 2, 3, 4]) > 1e-3
    assert abs(products[1, 2, 3, 5] - products[1, 2, 2, 5]) > 1e-3


def test_position_embeddings():
    """Columns in the first half, rows in the second; sines before cosines."""
    table = sincos_2d(4, 3, 8).reshape(4, 3, 8)
    np.testing.assert_allclose(table[2, 1], [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01),
                                             np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)], rtol=1e-6)  # fmt: skip
    stretched = sincos_2d(2, 6, 8, spacing=(2, 0.5)).reshape(2, 6, 8)
    np.testing.assert_array_equal(stretched[:, ::2], table[::2])
    rotary = rotary_angles(4, 3, 8).reshape(4, 3, 4)
    np.testing.assert_array_equal(rotary_angles(2, 6, 8, spacing=(2, 0.5)).reshape(2, 6, 4)[:, ::2], rotary[::2])


def test_interpolated_positions_are_those_of_the_shape():
    """Images of any size span the rows and columns of the shape, divided by the scale."""

    def table(shape, size, **options):
        network = build("networks", {**TINY, "depth": 1, **options}, shape=(*shape, 1))
        params = jax.eval_shape(network.init, jax.random.key(0))
        consts = jax.make_jaxpr(network.apply)(params, np.zeros((1, *size, 1)), np.zeros(1), {}).consts
        return next(np.asarray(const) for const in consts if np.ndim(const) == 2)

    plain = table((8, 4), (8, 4))
    np.testing.assert_array_equal(table((16, 8), (8, 4), interpolation_scale=2), plain)
    larger = table((8, 4), (16, 12), interpolation_scale=1).reshape(8, 6, -1)
    np.testing.assert_array_equal(larger[::2, ::3], plain.reshape(4, 2, -1))
    rope = {"positions": "rope"}
    np.testing.assert_array_equal(
        table((8, 4), (4, 8), interpolation_scale=2, **rope), rotary_angles(2, 4, 8, (1, 0.25))
    )


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"patch_size": 3}, "patch_size"),
        ({"width": 18}, "width"),
        ({"num_heads": 3}, "width"),
        ({"positions": "rope", "num_heads": 8}, "positions"),
        ({"mlp_ratio": 0.01}, "mlp_ratio"),
        ({"depth": 0}, "depth"),
        ({"norm": "batch"}, "norm"),
        ({"freq_shift": 2}, "freq_shift"),
        ({"remat": "some"}, "remat"),
        ({"modulation": "none"}, "modulation"),
        ({"text": "both"}, "text"),
        ({"interpolation_scale": 0}, "interpolation_scale"),
        ({"modulation": "single", "block_embedders": True}, "block_embedders"),
        ({"size_embedding": True}, "size_embedding"),
        (
            {"text_projection": "mlp", "conditions": {"text": ConditionSpec("text", (3,), vocabulary=5)}},
            "text_projection",
        ),
        (
            {"text": "joint", "block_embedders": True, "conditions": {"text": ConditionSpec("text", (3, 4))}},
            "block_embedders",
        ),
        ({"shape": (8, 7, 1)}, "patch_size"),
    ],
)
def test_bad_options(options, field):
    spec = {**TINY, **options}
    shape, conditions = spec.pop("shape", (8, 8, 1)), spec.pop("conditions", {})
    with refused(f"networks.{field}"):
        build("networks", spec, shape=shape, num_classes=10, conditions=conditions)
