"""Every guidance, found by listing the family: its numbers, and samples of every kind of network.

A new function is included automatically; what it needs in addition belongs in `OPTIONS`.
"""

import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build_network, find, names
from diffusion.core.types import Array, ArraySpec, Denoised, Spec, class_labels
from diffusion.pipelines.generator import PERTURBED, WRAPPERS, Generator
from diffusion.sampling.guidance import (
    apg,
    cads,
    cfg,
    cfg_per_condition,
    cfg_pp,
    fdg,
    guidance_embedding,
    icg,
    interval,
    pag,
    rescale,
    seg,
    slg,
    threshold,
)
from tests.refusals import refused
from tests.sampling.guidance.closed_form import COND, METHODS, VP, X, close, distilled, model, worse
from tests.tiers import slow_except

NAMES = names("guidance")
STATIC = [("threshold", "percentile"), ("seg", "sigma"), ("apg", "momentum")]  # numbers that are compiled in

# Traced keywords.

KEYS = jax.random.split(jax.random.key(0), 4)
POOR = {"perturbed": lambda _: worse}


def of_images(_, *scales):
    """Returns `fdg` of a model of images, whose x0 depends on the position."""

    def denoise(x, t, cond):
        image = jnp.sin(7 * jnp.arange(16.0)).reshape(1, 4, 4, 1)
        return Denoised(jnp.where(cond["keep"][:, None, None, None], image, 0 * x))

    return lambda x, t, cond: fdg(denoise, *scales)(jnp.zeros((4, 4, 4, 1)), t, cond)


def of_embeddings(_, *numbers):
    """Returns `cads` of a model that embeds its labels."""

    def denoise(x, t, cond):
        return Denoised(x + cond["label_noise"](X.reshape(4, 6)).reshape(x.shape))

    return cads(denoise, *numbers, keys=KEYS, conditions=class_labels(3))


ON = {"plain": model, "schedule": VP}
TRACED = {
    "cfg": (cfg, [(2.0,), (5.0,)]),
    "apg": (apg, [(2.0, 0.1, 1.0), (5.0, 0.5, 0.7)]),
    "cfg_zero": (METHODS["cfg_zero"], [(2.0, 0.9), (5.0, 0.2)]),
    "cfg_pp": (cfg_pp, [(0.4,), (0.9,)]),
    "cfg_per_condition": (lambda _, scale: cfg_per_condition(model, {"label": scale}), [(2.0,), (5.0,)]),
    "autoguidance": (METHODS["autoguidance"], [(2.0,), (5.0,)]),
    "guidance_embedding": (lambda _, scale: guidance_embedding(distilled, scale), [(2.0,), (5.0,)]),
    "fdg": (of_images, [(2.0, 3.0), (4.0, 5.0)]),
    "pag": (lambda _, scale: pag(model, scale, **POOR), [(2.0,), (5.0,)]),
    "seg": (lambda _, scale: seg(model, scale, **POOR), [(2.0,), (5.0,)]),
    "slg": (lambda _, scale, low, high: slg(model, scale, (), low, high, **POOR), [(2.0, 0.3, 0.4), (2.0, 0.4, 0.5)]),
    "icg": (lambda _, scale: icg(model, scale, keys=KEYS, conditions=class_labels(3)), [(2.0,), (5.0,)]),
    "cads": (of_embeddings, [(0.1, 0.5, 0.2, 0.9), (0.2, 0.6, 0.5, 0.1)]),
    "rescale": (lambda _, factor: rescale(cfg(model, 5.0), factor), [(0.1,), (0.9,)]),
    "interval": (lambda _, low, high: interval(cfg(model, 5.0), low, high, **ON), [(0.2, 0.4), (0.4, 0.6)]),
    "interval in sigma": (
        lambda _, low, high: interval(cfg(model, 5.0), low, high, "sigma", **ON),
        [(0.2, 4.0), (4.0, 6.0)],
    ),
    "static threshold": (lambda _, limit: threshold(model, limit=limit), [(0.9,), (0.3,)]),
    "dynamic threshold": (lambda _, limit: threshold(model, 0.8, limit), [(0.9,), (0.3,)]),
}


@pytest.mark.parametrize("name", TRACED)
def test_traced_numbers_do_not_recompile(name):
    method, choices = TRACED[name]
    traces = []

    @jax.jit
    def drawn(numbers, t):
        traces.append(name)
        return method(model, *numbers)(X, t, COND).x0

    first, second = (drawn(tuple(map(jnp.asarray, numbers)), 0.35) for numbers in choices)
    assert len(traces) == 1
    assert abs(first - second).max() > 1e-2
    for numbers, found in zip(choices, (first, second), strict=True):
        close(found, method(model, *numbers)(X, 0.35, COND).x0)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_are_annotated_as_traced(name):
    """`Generator` traces the keywords whose annotation contains Array."""
    for option, parameter in inspect.signature(find("guidance", name, field="")).parameters.items():
        if isinstance(parameter.default, float):
            is_traced = Array in typing.get_args(parameter.annotation)
            assert is_traced != ((name, option) in STATIC), option


# With every network.

NETWORKS = {
    "dit": {"width": 8, "depth": 3, "num_heads": 2, "patch_size": 4},
    "edm2": {"width": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (), "head_dim": 4},
    "mlp": {"width": 8, "depth": 1},
    "unet": {"width": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (), "head_dim": 4},
    "uvit": {"width": 8, "depth": 3, "num_heads": 2, "patch_size": 4},
}
OPTIONS = {"apg": {"momentum": -0.5}, "cfg_per_condition": {"scales": {"label": 2.0}}, "cfg_pp": {"scale": 0.6}}
DATA = Spec(ArraySpec((8, 8, 1), "image"), class_labels(3))


def refusal(name, network):
    """Returns the field that the error for an invalid combination names, or None for a valid one."""
    if name in PERTURBED and (network == "mlp" or (name == "slg" and network in ("unet", "edm2"))):
        return f"guidance.{name}.layers"
    return None


def is_quick(combination):
    name, network = combination
    return network == ("dit" if name in PERTURBED else "mlp")


def combinations():
    for name in NAMES:
        yield from ((name, network) for network in NETWORKS if name in (*PERTURBED, "cads") or network == "mlp")


def generator_of(name, network, objective, mesh):
    """Returns the network and the generator with a guidance of a name, alone or around `cfg`."""
    options = {"name": network, **NETWORKS[network]}
    if name == "guidance_embedding":
        options["scalar_conditions"] = ("guidance_scale",)
    network = build_network(options, DATA)
    guidance = {"name": name, "scale": 2.0, **OPTIONS.get(name, {})}
    if name in WRAPPERS and name not in PERTURBED:
        guidance = {"name": "cfg", "scale": 2.0, name: {}}
    if name == "cfg_per_condition":
        del guidance["scale"]
    worse = (network, objective, {"net": jax.jit(network.init)(jax.random.key(1))}) if name == "autoguidance" else None
    settings = {"sampler": {"name": "ddim", "steps": 2}, "guidance": guidance, "cond_drop_rate": 0.1}
    return network, Generator(network, objective, DATA, mesh, worse=worse, **settings)


@pytest.mark.parametrize(("name", "network"), slow_except(is_quick, combinations()))
def test_is_accepted_or_rejected_with_every_network(name, network, ddpm, mesh_of):
    field = refusal(name, network)
    if field:
        with refused(field):
            generator_of(name, network, ddpm, mesh_of(1, 1, 1))
    else:
        generator_of(name, network, ddpm, mesh_of(1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_samples_do_not_depend_on_their_batch(name, ddpm, mesh_of):
    network, generator = generator_of(name, "dit", ddpm, mesh_of(1, 1, 1))
    rng = np.random.default_rng(0)
    params = jax.jit(network.init)(jax.random.key(0))
    params = {"net": jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape), params)}
    cond = jax.tree.map(lambda value: value + 1, generator.spec.zeros(3))
    x = generator(params, cond, 3, seed=0)
    last = next(generator.batches(params, cond, 3, seed=0, batch_size=2, first=2))[0]
    assert x.shape == (3, 8, 8, 1) and np.isfinite(x).all()
    np.testing.assert_allclose(last[0], x[2], rtol=1e-4, atol=1e-4 * abs(x).max())
