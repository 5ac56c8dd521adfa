import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.build import build
from diffusion.types import InputError


def test_shape_and_zero_start(tiny_unet, digits_batch):
    params = jax.jit(tiny_unet.init)(jax.random.key(0))
    assert all(isinstance(key.key, str) for path, _ in jax.tree.leaves_with_path(params) for key in path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = tiny_unet.apply(params, digits_batch["x"], jnp.ones(16), digits_batch["cond"])
    assert out.shape == (16, 8, 8, 1) and out.dtype == jnp.float32
    assert not out.any()


def test_keep_chooses_the_null_embedding(tiny_unet, tiny_params, digits_batch):
    """Where `keep` is False the label does not matter, and where it is True it does."""
    x = jnp.broadcast_to(digits_batch["x"][:1], (4, 8, 8, 1))
    cond = {"label": jnp.array([3, 7, 3, 7]), "keep": jnp.array([True, True, False, False])}
    out = jax.jit(tiny_unet.apply)(tiny_params["net"], x, jnp.full(4, 500.0), cond)
    assert abs(out[0] - out[1]).max() > 1e-3
    assert abs(out[0] - out[2]).max() > 1e-3
    np.testing.assert_allclose(out[2], out[3], atol=1e-6)
    without = jax.jit(tiny_unet.apply)(tiny_params["net"], x, jnp.full(4, 500.0), {"label": cond["label"]})
    np.testing.assert_allclose(without[:2], out[:2], atol=1e-6)


def test_noise_label_matters(tiny_unet, tiny_params, digits_batch):
    out = [
        tiny_unet.apply(tiny_params["net"], digits_batch["x"], jnp.full(16, c), digits_batch["cond"]) for c in (1, 9)
    ]
    assert abs(out[0] - out[1]).max() > 1e-3


def test_examples_do_not_mix(tiny_unet, tiny_params, digits_batch):
    x, cond = digits_batch["x"], digits_batch["cond"]
    changed = x.at[3].set(0.5)
    apply = jax.jit(tiny_unet.apply)
    difference = abs(apply(tiny_params["net"], changed, jnp.ones(16), cond)
                     - apply(tiny_params["net"], x, jnp.ones(16), cond)).max(axis=(1, 2, 3))  # fmt: skip
    assert difference[3] > 1e-3 and np.delete(difference, 3).max() < 1e-6


def test_dropout_needs_a_key(digits, digits_batch):
    spec = {"name": "unet", "width": 8, "multipliers": (1,), "blocks": 1, "attention": (), "head_width": 8}
    network = build("networks", {**spec, "dropout": 0.5}, shape=digits.spec.shape, num_classes=10)
    leaves, tree = jax.tree.flatten(jax.jit(network.init)(jax.random.key(0)))
    params = jax.tree.unflatten(tree, [leaf + 0.1 for leaf in leaves])
    args = (params, digits_batch["x"], jnp.ones(16), digits_batch["cond"])
    apply = jax.jit(network.apply)
    np.testing.assert_array_equal(apply(*args), apply(*args))
    first, second = (apply(*args, key=jax.random.key(i)) for i in (0, 1))
    assert abs(first - second).max() > 1e-3 and abs(first - apply(*args)).max() > 1e-3


def test_bfloat16_computes_near_float32(digits, tiny_params, digits_batch):
    spec = {"name": "unet", "width": 8, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "head_width": 8}
    outs = []
    for dtype in ("float32", "bfloat16"):
        network = build("networks", {**spec, "dtype": dtype}, shape=digits.spec.shape, num_classes=10)
        params = jax.jit(network.init)(jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        outs.append(network.apply(tiny_params["net"], digits_batch["x"], jnp.ones(16), digits_batch["cond"]))
    assert outs[1].dtype == jnp.float32
    gap = abs(outs[0] - outs[1]).max()
    assert 1e-6 < gap < 0.05 * abs(outs[0]).max()


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"width": 0}, "width"),
        ({"width": 7}, "width"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1, 1, 1, 1, 1)}, "multipliers"),
        ({"attention": (5,)}, "attention"),
        ({"head_width": 5}, "head_width"),
        ({"dropout": 1.0}, "dropout"),
        ({"dtype": "float16"}, "dtype"),
        ({"shape": (8, 4, 1)}, "shape"),
    ],
)
def test_bad_options(keywords, field):
    spec = {"name": "unet", "width": 8, "multipliers": (1, 2), "attention": (4,), "head_width": 8, **keywords}
    shape = spec.pop("shape", (8, 8, 1))
    with pytest.raises(InputError, match=f"networks.{field}: "):
        build("networks", spec, shape=shape)
