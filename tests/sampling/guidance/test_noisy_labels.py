"""Condition-annealed sampling (`cads`) of the embeddings of labels, in networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build_network
from diffusion.core.types import ArraySpec, Spec, class_labels
from diffusion.pipelines.generator import Generator
from diffusion.sampling.guidance.conditions import Noise
from tests.sampling.guidance.test_every import NETWORKS
from tests.tiers import slow_except

DATA = Spec(ArraySpec((8, 8, 1), "image"), class_labels(3))
OPTIONS = {
    **NETWORKS,
    "dit with embedders": {"name": "dit", **NETWORKS["dit"], "block_embedders": True},
    "unet without null class": {"name": "unet", **NETWORKS["unet"], "null_class": False},
}


@functools.cache
def network_of(name):
    """Returns a network and parameters none of which is zero."""
    network = build_network({"name": name, **OPTIONS[name]}, DATA)
    rng = np.random.default_rng(0)
    params = jax.jit(network.init)(jax.random.key(0))
    return network, jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape), params)


@pytest.mark.parametrize("name", slow_except(("mlp",), OPTIONS))
def test_networks_replace_the_embedding(name):
    network, params = network_of(name)
    x = np.random.default_rng(1).normal(size=(4, 8, 8, 1)).astype(np.float32)

    @jax.jit
    def output(label, gamma=None, seed=0, keep=True):
        cond = {"label": label, "keep": jnp.full(4, keep)}
        if gamma is not None:
            keys = jax.random.split(jax.random.key(seed), 4)
            cond["label_noise"] = Noise(keys, jnp.full(4, gamma), jnp.full(4, 0.5), jnp.zeros(4))
        return network.apply(params, x, jnp.full(4, 0.3), cond)

    first, second = np.array([0, 1, 2, 0]), np.array([1, 2, 0, 1])
    plain, noise = output(first), output(first, 0.0)
    np.testing.assert_array_equal(output(first, 1.0), plain)
    np.testing.assert_allclose(output(second, 0.0), noise, rtol=1e-5, atol=1e-5 * abs(noise).max())
    for other in (plain, output(second), output(first, 0.0, 1), output(first, 0.5)):
        assert (abs(noise - other).max(axis=(1, 2, 3)) > 1e-3 * abs(noise).max()).all()
    np.testing.assert_array_equal(output(first, 0.0, keep=False), output(first, keep=False))


@pytest.mark.parametrize("name", ["unet", pytest.param("dit", marks=pytest.mark.slow)])
def test_samples_with_classifier_free_guidance(name, ddpm, mesh_of):
    network, params = network_of(name)
    labels = {"label": np.array([0, 1, 1])}

    def generator(**guidance):
        section = {"name": "cfg", "scale": 2.0, **guidance}
        sampler = {"name": "ddim", "steps": 3}
        return Generator(network, ddpm, DATA, mesh_of(1, 1, 1), sampler=sampler, guidance=section, cond_drop_rate=0.1)

    annealed = generator(cads={"tau1": 0.5, "tau2": 0.9, "noise_scale": 0.5})
    x = annealed({"net": params}, labels, 3, seed=0)
    plain = generator()({"net": params}, labels, 3, seed=0)
    assert np.isfinite(x).all() and (abs(x - plain).max(axis=(1, 2, 3)) > 1e-3 * abs(plain).max()).all()
    in_batches = annealed({"net": params}, labels, 3, seed=0, batch_size=2)
    np.testing.assert_allclose(in_batches, x, rtol=1e-4, atol=1e-4 * abs(x).max())
    without = annealed.with_settings(sampler={"steps": 3}, guidance={"name": "cfg", "scale": 2.0, "cads": {
        "tau1": 1.0, "tau2": 1.1, "noise_scale": 0.5}})  # fmt: skip
    np.testing.assert_array_equal(without({"net": params}, labels, 3, seed=0), plain)
