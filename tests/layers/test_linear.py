"""The linear layer that is fast on CPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.layers.linear import Linear


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 3), (2, 4, 5, 3)])
def test_a_linear_layer_is_that_of_flax(shape, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    ours, theirs = (layer(3, 7, rngs=nnx.Rngs(0)) for layer in (Linear, nnx.Linear))

    def loss(layer):
        return jnp.sum(jnp.sin(layer(x)))

    np.testing.assert_allclose(ours(x), theirs(x), atol=1e-6)
    for mine, flax in zip(*(jax.tree.leaves(nnx.grad(loss)(layer)) for layer in (ours, theirs)), strict=True):
        np.testing.assert_allclose(mine, flax, atol=1e-5)


def test_products_are_those_of_matrices_on_one_cpu(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    layer = Linear(3, 7, rngs=nnx.Rngs(0))
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: jnp.sum(jnp.sin(layer(x)))))(jnp.ones((2, 5, 3)))
    products = [equation for equation in jaxpr.eqns if equation.primitive.name == "dot_general"]
    assert products and all(var.aval.ndim == 2 for equation in products for var in equation.invars)
