"""MLP: its shapes, its parameters, and the effect of its inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from tests.refusals import refused
from tests.tiers import slow_except

DEPTH, WIDTH = 3, 16


def mlp(shape=(2,), num_classes=4, **keywords):
    return build("networks", {"name": "mlp", "width": WIDTH, "depth": DEPTH, **keywords},
                 shape=shape, num_classes=num_classes)  # fmt: skip


def nonzero(network):
    """Returns parameters of which none is zero, so that every input has an effect."""
    rng = np.random.default_rng(0)
    params = jax.jit(network.init)(jax.random.key(0))
    return jax.tree.map(lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def network():
    return mlp()


@pytest.fixture(scope="module")
def params(network):
    return nonzero(network)


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(0), (8, 2))


COND = {"label": jnp.arange(8) % 4}


SHAPES = [((2,), 1, (2,)), ((5,), 2, (10,)), ((4, 3, 2), 1, (4, 3, 2)), ((4, 3), 3, (4, 9))]


@pytest.mark.parametrize(("shape", "outputs", "expected"), slow_except(SHAPES[3:], SHAPES))
def test_shape_and_zero_output_at_initialisation(shape, outputs, expected):
    network = mlp(shape, num_classes=0, outputs=outputs)
    assert network.outputs == outputs
    params = jax.jit(network.init)(jax.random.key(0))
    assert all(isinstance(key.key, str) for path, _ in jax.tree.leaves_with_path(params) for key in path)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    x = jnp.ones((6, *shape))
    apply = jax.jit(network.apply)
    out = apply(params, x, jnp.full(6, 500.0), {})
    assert out.shape == (6, *expected) and out.dtype == jnp.float32
    assert not out.any()
    assert apply(jax.tree.map(lambda leaf: leaf + 0.1, params), x, jnp.full(6, 500.0), {}).any()


def test_initial_parameters_depend_on_the_key(network):
    init = jax.jit(network.init)
    first, second, other = (init(jax.random.key(k)) for k in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    for path, leaf in jax.tree.leaves_with_path(jax.tree.map(lambda a, b: jnp.where(a == 0, 1, a - b), first, other)):
        assert leaf.any(), jax.tree_util.keystr(path)


def test_blocks_are_stacked_independent_and_all_used(network, params, x):
    fresh = jax.jit(network.init)(jax.random.key(0))["blocks"]
    assert {leaf.shape[0] for leaf in jax.tree.leaves(fresh)} == {DEPTH}
    kernels = np.asarray(fresh["kernel1"])
    assert not np.array_equal(kernels[0], kernels[1])
    # LeCun's variance depends on the width of a single block.
    np.testing.assert_allclose(kernels.std(), WIDTH**-0.5, rtol=0.15)
    apply = jax.jit(network.apply)
    out = apply(params, x, jnp.full(8, 500.0), COND)
    for name, leaf in params["blocks"].items():
        for block in range(DEPTH):
            changed = {**params, "blocks": {**params["blocks"], name: leaf.at[block].add(0.3)}}
            assert abs(apply(changed, x, jnp.full(8, 500.0), COND) - out).max() > 1e-4, (name, block)


def test_every_parameter_has_a_gradient(network, params, x):
    cond = {**COND, "keep": jnp.arange(8) % 3 > 0}
    grads = jax.jit(jax.grad(lambda p: (network.apply(p, x, jnp.full(8, 500.0), cond) ** 2).mean()))(params)
    for path, leaf in jax.tree.leaves_with_path(grads):
        assert leaf.any() and np.isfinite(leaf).all(), jax.tree_util.keystr(path)


def test_keep_selects_the_null_class(network, params, x):
    """The label has an effect where `keep` is True and none where it is False."""
    x = jnp.broadcast_to(x[:1], (4, 2))
    cond = {"label": jnp.array([1, 3, 1, 3]), "keep": jnp.array([True, True, False, False])}
    out = jax.jit(network.apply)(params, x, jnp.full(4, 500.0), cond)
    assert abs(out[0] - out[1]).max() > 1e-3
    assert abs(out[0] - out[2]).max() > 1e-3
    np.testing.assert_allclose(out[2], out[3], atol=1e-6)
    without = jax.jit(network.apply)(params, x, jnp.full(4, 500.0), {"label": cond["label"]})
    np.testing.assert_allclose(without[:2], out[:2], atol=1e-6)


def test_noise_label_matters(network, params, x):
    out = [network.apply(params, x, jnp.full(8, c), COND) for c in (1.0, 9.0)]
    assert abs(out[0] - out[1]).max() > 1e-3


def test_length_of_x_matters(network, params, x):
    """Also at initialisation: no norm discards the length."""
    params = {**jax.jit(network.init)(jax.random.key(0)), "linear_out": params["linear_out"]}
    out = [network.apply(params, c * x, jnp.zeros(8), COND) - params["linear_out"]["bias"] for c in (1, 2)]
    np.testing.assert_allclose(out[1], 2 * out[0], rtol=1e-4, atol=1e-5)  # the blocks are the identity


def test_examples_do_not_mix(network, params, x):
    apply = jax.jit(network.apply)
    c_noise = jnp.full(8, 500.0)
    out = apply(params, x, c_noise, COND)
    for changed in (
        apply(params, x.at[3].set(0.5), c_noise, COND),
        apply(params, x, c_noise.at[3].set(20.0), COND),
        apply(params, x, c_noise, {"label": COND["label"].at[3].set(0)}),
    ):
        difference = abs(changed - out).max(axis=1)
        assert difference[3] > 1e-3 and np.delete(difference, 3).max() < 1e-6


def test_bfloat16_is_close_to_float32(network, params, x):
    other = mlp(dtype="bfloat16")
    fresh = jax.jit(other.init)(jax.random.key(0))
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    outs = [n.apply(params, x, jnp.full(8, 500.0), COND) for n in (network, other)]
    assert outs[1].dtype == jnp.float32
    gap = abs(outs[0] - outs[1]).max()
    assert 1e-6 < gap < 0.05 * abs(outs[0]).max()


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"width": 0}, "width"),
        ({"width": 7}, "width"),
        ({"depth": 0}, "depth"),
        ({"outputs": 0}, "outputs"),
        ({"dtype": "float16"}, "dtype"),
        ({"shape": ()}, "shape"),
        ({"shape": (0, 2)}, "shape"),
    ],
)
def test_bad_options(keywords, field):
    with refused(f"networks.{field}"):
        mlp(**keywords)
