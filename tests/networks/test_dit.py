"""DiT: its sizes, its parts, and what its options change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import InputError
from diffusion.layers.positions import rotary_angles, rotate, sincos_2d

TINY = {"name": "dit", "patch_size": 2, "width": 16, "depth": 3, "num_heads": 2}
PAPER = {"S": (384, 12, 6, 33), "B": (768, 12, 12, 130), "L": (1024, 24, 16, 458), "XL": (1152, 28, 16, 675)}


def tiny(**options):
    """A small DiT of digits with nothing left at zero, and its parameters."""
    network = build("networks", {**TINY, **options}, shape=(8, 8, 1), num_classes=10)
    params = jax.jit(network.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    return network, jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), params)


X = np.random.default_rng(1).normal(size=(3, 8, 8, 1)).astype(np.float32)
C_NOISE, COND = np.float32([10, 300, 900]), {"label": np.array([0, 3, 9])}


@pytest.mark.parametrize("size", PAPER)
def test_the_papers_parameter_counts(size):
    width, depth, heads, millions = PAPER[size]
    spec = {"name": "dit", "patch_size": 2, "width": width, "depth": depth, "num_heads": heads, "outputs": 2}
    network = build("networks", spec, shape=(32, 32, 4), num_classes=1000)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6) == millions


def test_starts_at_zero():
    network = build("networks", TINY, shape=(8, 8, 1), num_classes=10)
    params = jax.jit(network.init)(jax.random.key(0))
    out = network.apply(params, X, C_NOISE, COND)
    assert out.shape == X.shape and out.dtype == jnp.float32 and not out.any()


def test_blocks_are_drawn_apart():
    network = build("networks", TINY, shape=(8, 8, 1), num_classes=10)
    kernel = jax.jit(network.init)(jax.random.key(0))["blocks"]["blocks"]["qkv"]["kernel"]
    assert kernel.shape == (3, 16, 48)
    assert abs(kernel[0] - kernel[1]).max() > 0.1
    # Xavier's bound goes by one block's own fans.
    assert 0.95 < abs(kernel).max() / (6 / (16 + 48)) ** 0.5 <= 1


OPTIONS = [{}, {"positions": "rope"}, {"norm": "rms"}, {"qk_norm": True}, {"mlp": "swiglu"}, {"outputs": 2},
           {"dtype": "bfloat16"}, {"patch_size": 4}]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_input_matters(options):
    network, params = tiny(**options)
    apply = jax.jit(network.apply)
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


def test_an_example_does_not_see_its_neighbours():
    network, params = tiny()
    out = network.apply(params, X, C_NOISE, COND)
    alone = network.apply(params, X[:1], C_NOISE[:1], {"label": COND["label"][:1]})
    np.testing.assert_allclose(alone, out[:1], atol=1e-4 * abs(out).max())


@pytest.mark.parametrize("positions", ["sincos", "rope"])
def test_places_matter(positions):
    """Two tokens exchanged at the input do not merely come out exchanged."""
    network, params = tiny(positions=positions)
    swapped = X.copy()
    swapped[:, :2, :2], swapped[:, 4:6, 2:4] = X[:, 4:6, 2:4], X[:, :2, :2]
    out, other = (np.array(network.apply(params, x, C_NOISE, COND)) for x in (X, swapped))
    back = other.copy()
    back[:, :2, :2], back[:, 4:6, 2:4] = other[:, 4:6, 2:4], other[:, :2, :2]
    assert abs(back - out).max() > 1e-3


def test_patches_are_squares_of_the_image():
    """A change of one patch reaches, without the blocks, that patch alone."""
    network, params = tiny()
    params["blocks"] = jax.tree.map(jnp.zeros_like, params["blocks"])
    changed = X.copy()
    changed[:, 2:4, 6:8] += 1
    before, after = (network.apply(params, x, C_NOISE, COND) for x in (X, changed))
    difference = abs(after - before).max((0, 3))
    assert (difference[2:4, 6:8] > 0).all()
    difference = np.array(difference)
    difference[2:4, 6:8] = 0
    assert not difference.any()


def test_depth_costs_no_code():
    def lines(depth):
        network = build("networks", {**TINY, "depth": depth}, shape=(8, 8, 1), num_classes=10)
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        return len(jax.jit(network.apply).lower(shapes, X, C_NOISE, COND).as_text().splitlines())

    assert lines(24) == lines(2)


def test_rotation_makes_products_relative(x64):
    """q at place a times k at place b depends on a - b alone, in rows and in columns."""
    side, rng = 6, np.random.default_rng(0)
    q, k = rng.normal(size=(2, 1, 1, 1, 8))
    angles = np.float64(rotary_angles(side, 8))
    q, k = (rotate(jnp.broadcast_to(x, (1, side**2, 1, 8)), angles)[0, :, 0] for x in (q, k))
    products = np.asarray(q @ k.T).reshape(side, side, side, side)
    np.testing.assert_allclose(products[1, 2, 3, 5], products[2, 1, 4, 4], rtol=1e-5)
    assert abs(products[1, 2, 3, 5] - products[1, 2, 3, 4]) > 1e-3
    assert abs(products[1, 2, 3, 5] - products[1, 2, 2, 5]) > 1e-3


def test_embeddings_of_places():
    """Columns in the first half, rows in the second; sines, then cosines."""
    table = sincos_2d(3, 8).reshape(3, 3, 8)
    np.testing.assert_allclose(table[2, 1], [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01),
                                             np.sin(2), np.sin(0.02), np.cos(2), np.cos(0.02)], rtol=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 3}, "patch: 3 does not divide the 8 pixels"),
        ({"width": 18}, "width: must be divisible by 4"),
        ({"num_heads": 3}, "width: must be divisible by 4 and by heads = 3"),
        ({"positions": "rope", "num_heads": 8}, "positions: rope wants heads of a width divisible by 4, got 2"),
        ({"depth": 0}, "depth: must be positive"),
        ({"norm": "batch"}, "norm: "),
        ({"remat": "some"}, "remat: "),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InputError, match=f"networks.{message}"):
        build("networks", {**TINY, **options}, shape=(8, 8, 1), num_classes=10)
    with pytest.raises(InputError, match="shape: dit takes square images"):
        build("networks", TINY, shape=(8, 4, 1))
