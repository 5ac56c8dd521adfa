"""U-Net: its shapes, its options, and the effect of its inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.core.build import build
from diffusion.layers.residual import BlockConfig, ResidualBlock
from tests.refusals import refused


@pytest.fixture(scope="module")
def apply(tiny_unet):
    return jax.jit(tiny_unet.apply)


def test_shape_and_zero_output_at_initialisation(tiny_unet, apply, digits_batch):
    params = jax.jit(tiny_unet.init)(jax.random.key(0))
    assert all(isinstance(key.key, str) for path, _ in jax.tree.leaves_with_path(params) for key in path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    out = apply(params, digits_batch["x"], jnp.ones(16), digits_batch["cond"])
    assert out.shape == (16, 8, 8, 1) and out.dtype == jnp.float32
    assert not out.any()


def test_keep_selects_the_null_class(apply, tiny_params, digits_batch):
    """The label has an effect where `keep` is True and none where it is False."""
    x = jnp.broadcast_to(digits_batch["x"][:1], (16, 8, 8, 1))
    cond = {"label": jnp.tile(jnp.array([3, 7, 3, 7]), 4), "keep": jnp.arange(16) % 4 < 2}
    out = apply(tiny_params["net"], x, jnp.full(16, 500.0), cond)
    assert abs(out[0] - out[1]).max() > 1e-3
    assert abs(out[0] - out[2]).max() > 1e-3
    np.testing.assert_allclose(out[2], out[3], atol=1e-6)
    without = apply(tiny_params["net"], x, jnp.full(16, 500.0), {"label": cond["label"]})
    np.testing.assert_allclose(without[:2], out[:2], atol=1e-6)


def test_noise_label_matters(apply, tiny_params, digits_batch):
    x, cond = digits_batch["x"], digits_batch["cond"]
    out = [apply(tiny_params["net"], x, jnp.full(16, c), cond) for c in (1.0, 9.0)]
    assert abs(out[0] - out[1]).max() > 1e-3


def test_embedding_scale_multiplies_the_noise_label():
    """A Fourier embedding of scale 0.02 has at c_noise the features that one of scale 16 has at 0.02 / 16 c_noise."""
    x, labels = jnp.ones((2, 4, 4, 1)), jnp.array([-1.5, 1.1])

    def out(scale, factor):
        spec = {"name": "unet", "width": 4, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (),
                "middle_attention": False, "embedding": "fourier", "embedding_scale": scale}  # fmt: skip
        network = build("networks", spec, shape=(4, 4, 1))
        shapes = jax.eval_shape(network.init, jax.random.key(0))
        params = jax.tree.map(lambda leaf: np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape), shapes)
        return jax.jit(network.apply)(params, x, factor * labels, {})

    small = out(0.02, 1)
    np.testing.assert_allclose(small, out(16.0, 0.02 / 16), atol=1e-4)
    assert abs(small - out(16.0, 1)).max() > 1e-2


def test_examples_do_not_mix(apply, tiny_params, digits_batch):
    x, cond = digits_batch["x"], digits_batch["cond"]
    changed = x.at[3].set(0.5)
    difference = abs(apply(tiny_params["net"], changed, jnp.ones(16), cond)
                     - apply(tiny_params["net"], x, jnp.ones(16), cond)).max(axis=(1, 2, 3))  # fmt: skip
    assert difference[3] > 1e-3 and np.delete(difference, 3).max() < 1e-6


def test_dropout_needs_a_key(digits, digits_batch):
    spec = {
        "name": "unet",
        "width": 8,
        "channel_mult": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "head_dim": 8,
    }
    network = build("networks", {**spec, "dropout": 0.5}, shape=digits.spec.shape, num_classes=10)
    leaves, tree = jax.tree.flatten(jax.jit(network.init)(jax.random.key(0)))
    params = jax.tree.unflatten(tree, [leaf + 0.1 for leaf in leaves])
    args = (params, digits_batch["x"], jnp.ones(16), digits_batch["cond"])
    apply = jax.jit(network.apply)
    np.testing.assert_array_equal(apply(*args), apply(*args))
    first, second = (apply(*args, key=jax.random.key(i)) for i in (0, 1))
    assert abs(first - second).max() > 1e-3 and abs(first - apply(*args)).max() > 1e-3


def test_bfloat16_is_close_to_float32(apply, digits, tiny_params, digits_batch):
    spec = {
        "name": "unet",
        "width": 8,
        "channel_mult": (1, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (4,),
        "head_dim": 8,
        "dtype": "bfloat16",
    }
    network = build("networks", spec, shape=digits.spec.shape, num_classes=10)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    args = tiny_params["net"], digits_batch["x"], jnp.ones(16), digits_batch["cond"]
    outs = [compiled(*args) for compiled in (apply, jax.jit(network.apply))]
    assert outs[1].dtype == jnp.float32
    gap = abs(outs[0] - outs[1]).max()
    assert 1e-6 < gap < 0.05 * abs(outs[0]).max()


NCSNPP = {"name": "unet", "width": 8, "channel_mult": (1, 2), "num_res_blocks": 2, "attention_resolutions": (8,),
          "head_dim": None, "scale_shift": False, "resample": "projected", "rescale": True, "up_attention": "last",
          "resample_filter": (1, 3, 3, 1), "input_skip": True, "embedding": "fourier"}  # fmt: skip


def random_net(spec, num_classes=0):
    """Returns a U-Net for 8 x 8 x 1, and parameters of which none is zero."""
    network = build("networks", spec, shape=(8, 8, 1), num_classes=num_classes)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return network, jax.tree.map(lambda s: 0.2 * rng.normal(size=s.shape).astype(np.float32), shapes)


@pytest.mark.slow
def test_parts_of_ncsnpp():
    network, params = random_net(NCSNPP)
    assert [name for name in params["up"] if "attention" in params["up"][name]] == ["0_2"]
    assert [name for name in params["down"] if "attention" in params["down"][name]] == ["0_0", "0_1"]
    assert params["inputs"]["0_down"]["kernel"].shape == (3, 3, 1, 8)
    assert params["down"]["0_down"]["residual"]["skip"]["kernel"].shape == (8, 8)  # projected
    x, c_noise = np.ones((2, 8, 8, 1), np.float32) * [[[[1.0]]], [[[2.0]]]], np.float32([0.5, -1])
    apply = jax.jit(network.apply)
    out = apply(params, np.float32(x), c_noise, {})
    for path in (("inputs", "0_down", "kernel"), ("conv_in", "kernel")):
        changed = jax.tree.map(lambda leaf: leaf, params)
        changed[path[0]] = jax.tree.map(jnp.zeros_like, changed[path[0]])
        assert abs(apply(changed, np.float32(x), c_noise, {}) - out).max() > 1e-3, path


@pytest.mark.slow
def test_rescaled_sums():
    """At initialisation the output of a block is its input, divided by sqrt(2) with `rescale`."""
    x, emb = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32), jnp.ones((2, 4))
    for rescale, factor in ((False, 1), (True, 2**-0.5)):
        block = ResidualBlock(8, 8, BlockConfig(4, rescale=rescale), rngs=nnx.Rngs(0))
        np.testing.assert_allclose(block(x, emb, None), factor * x, rtol=1e-6)
        halved = ResidualBlock(8, 8, BlockConfig(4, rescale=rescale), resample="halve", rngs=nnx.Rngs(0))
        expected = factor * x.reshape(2, 4, 2, 4, 2, 8).mean((2, 4))
        np.testing.assert_allclose(halved(x, emb, None), expected, atol=1e-6)


def test_without_a_null_class_nothing_is_added():
    spec = {"name": "unet", "width": 8, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (),
            "head_dim": 8, "null_class": False}  # fmt: skip
    network, params = random_net(spec, num_classes=3)
    assert params["embed"]["label"]["embedding"].shape == (3, 32)
    x, c_noise, label = np.ones((3, 8, 8, 1), np.float32), np.ones(3, np.float32), np.array([0, 1, 2])
    apply = jax.jit(network.apply)
    out = apply(params, x, c_noise, {"label": label, "keep": np.array([True, False, False])})
    params["embed"]["label"]["embedding"] = np.zeros((3, 32), np.float32)  # not in place: `out` may still be computed
    none = apply(params, x, c_noise, {"label": label, "keep": np.array([True, True, True])})
    np.testing.assert_allclose(out[1:], none[1:], atol=1e-5)
    assert abs(out[0] - none[0]).max() > 1e-3


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"width": 0}, "width"),
        ({"width": 7}, "width"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"channel_mult": (1, 1, 1, 1, 1)}, "channel_mult"),
        ({"attention_resolutions": (5,)}, "attention_resolutions"),
        ({"head_dim": 5}, "head_dim"),
        ({"dropout": 1.0}, "dropout"),
        ({"dtype": "float16"}, "dtype"),
        ({"shape": (8, 8)}, "shape"),
        ({"shape": (8, 7, 1)}, "channel_mult"),
        ({"resample_filter": (1, 2, 1)}, "resample_filter"),
        ({"resample_filter": (1, 2)}, "resample_filter"),
        ({"groups": 3}, "groups"),
        ({"middle_attention_groups": 3}, "middle_attention_groups"),
        ({"channel_mult": (1, 0.01)}, "channel_mult"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"freq_shift": 2}, "freq_shift"),
        ({"up_attention": "first"}, "up_attention"),
    ],
)
def test_bad_options(keywords, field):
    spec = {
        "name": "unet",
        "width": 8,
        "channel_mult": (1, 2),
        "attention_resolutions": (4,),
        "head_dim": 8,
        **keywords,
    }
    shape = spec.pop("shape", (8, 8, 1))
    with refused(f"networks.{field}"):
        build("networks", spec, shape=shape)
