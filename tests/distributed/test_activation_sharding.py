"""Sharding constraints at the boundaries of blocks: absent by default, and like the batch where they are enabled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion.core.build import build
from diffusion.distributed.activation_sharding import by_example_only, constrain, enabled
from diffusion.encoders.tiling import one_by_one
from tests.refusals import refused
from tests.tiers import slow_except

NETWORKS = {
    "dit": {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 2},
    "uvit": {"width": 16, "depth": 3, "num_heads": 2, "patch_size": 2},
    "unet": {"width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), "head_dim": 8},
    "unet_text": {"width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "depth": (0, 1), "num_heads": 2},
    "edm2": {"width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), "head_dim": 8},
    "mlp": {"width": 16, "depth": 2},
}


@pytest.fixture
def network(request):
    """Returns a network, parameters of which none is zero, and a batch of eight."""
    name = request.param
    network = build("networks", {"name": name, **NETWORKS[name]}, shape=(8, 8, 1), num_classes=3)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda p: 0.1 * np.cos(np.arange(p.size, dtype=np.float32)).reshape(p.shape), shapes)
    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    return network, (params, x, jnp.linspace(0.1, 0.9, 8), {"label": jnp.arange(8) % 3})


@pytest.mark.parametrize("network", NETWORKS, indirect=True)
def test_every_network_has_constraints(network, mesh_of):
    network, args = network
    constrained = enabled(network.apply, NamedSharding(mesh_of(1, 8, 1), P("fsdp")))
    assert "sharding_constraint" not in str(jax.make_jaxpr(network.apply)(*args))
    assert str(jax.make_jaxpr(constrained)(*args)).count("sharding_constraint") >= 3


@pytest.mark.parametrize("network", slow_except(("dit",), NETWORKS), indirect=True)
def test_constraints_change_nothing(network, mesh_of):
    network, args = network
    constrained = enabled(network.apply, NamedSharding(mesh_of(1, 8, 1), P("fsdp")))
    np.testing.assert_allclose(jax.jit(constrained)(*args), jax.jit(network.apply)(*args), atol=1e-5)


def test_constraints_end_after_an_error(mesh_of):
    sharding = NamedSharding(mesh_of(1, 8, 1), P("fsdp"))
    with pytest.raises(ZeroDivisionError):
        enabled(lambda: 1 / 0, sharding)()
    x = jnp.zeros(8)
    assert constrain(x) is x


def test_tokens_are_sharded_over_the_sequence_axis(mesh_of):
    sharding = NamedSharding(mesh_of(1, 2, 4), P("fsdp"))
    constrained = jax.jit(enabled(constrain, sharding, "model"))
    assert constrained(jnp.zeros((2, 8, 3))).sharding.spec == P("fsdp", "model")
    for shape in ((2, 8), (2, 8, 8, 3)):
        assert constrained(jnp.zeros(shape)).sharding.spec == P("fsdp")
    with refused("sharding.sequence"):
        constrained(jnp.zeros((2, 6, 3)))
    by_example = jax.jit(enabled(by_example_only(constrain), sharding, "model"))
    assert by_example(jnp.zeros((2, 6, 3))).sharding.spec == P("fsdp")
    assert by_example_only(constrain)(jnp.zeros(2)).shape == (2,)  # also where there are no constraints


def test_a_batch_that_is_not_divisible_has_no_constraint(mesh_of):
    sharding = NamedSharding(mesh_of(2, 4, 1), P(("data", "fsdp")))
    for rows, count in ((16, 1), (12, 0)):
        jaxpr = jax.make_jaxpr(enabled(constrain, sharding))(jnp.zeros((rows, 2)))
        assert str(jaxpr).count("sharding_constraint") == count


def test_one_example_at_a_time_is_one_per_device(mesh_of):
    """Each device applies the function to its own examples, of which it needs no others."""
    sharding = NamedSharding(mesh_of(1, 4, 1), P("fsdp"))
    centred = lambda x: x - x.mean((1, 2), keepdims=True)  # noqa: E731
    sliced = jax.jit(enabled(one_by_one(centred), sharding), in_shardings=sharding, out_shardings=sharding)
    x = np.random.default_rng(0).normal(size=(8, 4, 3)).astype(np.float32)
    np.testing.assert_allclose(sliced(x), centred(x), atol=1e-6)
    text = sliced.lower(x).compile().as_text()
    assert "all-gather" not in text and '"known_trip_count":{"n":"2"}' in text
