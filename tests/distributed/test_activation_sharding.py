"""Borders of blocks: nothing for who does not ask, the batch's layout for who does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion.core.build import build
from diffusion.core.types import InputError
from diffusion.distributed import activation_sharding

NETWORKS = {
    "dit": {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 2},
    "uvit": {"width": 16, "depth": 3, "num_heads": 2, "patch_size": 2},
    "unet": {"width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), "head_dim": 8},
    "edm2": {"width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), "head_dim": 8},
    "mlp": {"width": 16, "depth": 2},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_has_borders_and_computes_the_same(name, mesh_of):
    network = build("networks", {"name": name, **NETWORKS[name]}, shape=(8, 8, 1), num_classes=3)
    params = jax.jit(network.init)(jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.01 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    x = jax.random.normal(jax.random.key(1), (8, 8, 8, 1))
    cond = {"label": jnp.arange(8) % 3}
    place = NamedSharding(mesh_of(1, 8, 1), P("fsdp"))
    args = params, x, jnp.linspace(0.1, 0.9, 8), cond
    assert "sharding_constraint" not in str(jax.make_jaxpr(network.apply)(*args))
    kept = activation_sharding.enabled(network.apply, place)
    assert str(jax.make_jaxpr(kept)(*args)).count("sharding_constraint") >= 3
    np.testing.assert_allclose(jax.jit(kept)(*args), jax.jit(network.apply)(*args), atol=1e-5)


def test_leaves_no_trace_behind(mesh_of):
    place = NamedSharding(mesh_of(1, 8, 1), P("fsdp"))
    with pytest.raises(ZeroDivisionError):
        activation_sharding.enabled(lambda: 1 / 0, place)()
    x = jnp.zeros(8)
    assert activation_sharding.constrain(x) is x


def test_tokens_are_split_where_they_are_asked_to_be(mesh_of):
    place = NamedSharding(mesh_of(1, 2, 4), P("fsdp"))
    kept = jax.jit(activation_sharding.enabled(activation_sharding.border, place, "model"))
    assert kept(jnp.zeros((2, 8, 3))).sharding.spec == P("fsdp", "model")
    assert kept(jnp.zeros((2, 8))).sharding.spec == kept(jnp.zeros((2, 8, 8, 3))).sharding.spec == P("fsdp")
    with pytest.raises(InputError, match=r"sharding.sequence: splits tokens over the 4 devices .* the 6 there are"):
        kept(jnp.zeros((2, 6, 3)))


def test_a_part_of_a_batch_that_does_not_divide_is_left_alone(mesh_of):
    place = NamedSharding(mesh_of(2, 4, 1), P(("data", "fsdp")))
    for rows, times in ((16, 1), (12, 0)):
        text = str(jax.make_jaxpr(activation_sharding.enabled(activation_sharding.border, place))(jnp.zeros((rows, 2))))
        assert text.count("sharding_constraint") == times
