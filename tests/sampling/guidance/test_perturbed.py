"""Guidance by a network with perturbed blocks: the formulas on closed-form denoisers, and samples of a network."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import Denoised, Perturbation
from diffusion.pipelines.generator import Generator, is_neutral
from diffusion.sampling.guidance import cfg, pag, rescale, seg, slg
from diffusion.sampling.loop import bind, prior, sample
from tests.refusals import refused
from tests.sampling.guidance.closed_form import COND, TIMES, X, broadcast, close, halves, model, sampled, x0_of

METHODS = {"pag": pag, "seg": seg, "slg": slg}


def poor(x, t, cond):
    """The model with perturbed blocks."""
    return Denoised(x0_of(x, t, 0.5 * cond["label"] - 1.0))


def poor_x0(t):
    return np.float64(x0_of(X, t, 0.5 * COND["label"] - 1.0))


@pytest.mark.parametrize("t", TIMES, ids=["scalar", "per-example"])
@pytest.mark.parametrize("name", METHODS)
def test_moves_away_from_the_perturbed_prediction(name, t):
    """arXiv 2403.17377 and 2408.00760: with 0 the unguided prediction, and alone or around other guidance."""
    conditional, unconditional = halves(t)
    for scale in (0.0, 2.5):
        found = METHODS[name](model, scale, perturbed=lambda _: poor)(X, t, COND)
        close(found.x0, conditional + scale * (conditional - poor_x0(t)))
        close(found.conditional, conditional)
        close(found.log_variance, conditional / 2)
    around = METHODS[name](cfg(model, 4.0), 2.5, perturbed=lambda _: poor)
    expected = unconditional + 4 * (conditional - unconditional) + 2.5 * (conditional - poor_x0(t))
    close(around(X, t, COND).x0, expected)
    shrink = np.std(conditional, axis=(1, 2), keepdims=True) / np.std(expected, axis=(1, 2), keepdims=True)
    close(rescale(around, 1.0)(X, t, COND).x0, expected * shrink)


def test_which_perturbation_each_requests():
    requested = []

    def perturbed(perturbation):
        requested.append(perturbation)
        return poor

    for method in (pag, functools.partial(seg, sigma=2.0), seg, slg):
        method(model, layers=(1, 2), perturbed=perturbed)
    assert requested == [Perturbation("identity", (1, 2)), Perturbation("blur", (1, 2), 2.0),
                         Perturbation("blur", (1, 2), math.inf), Perturbation("skip", (1, 2))]  # fmt: skip


@pytest.mark.parametrize("t", [0.2, 0.5, 0.6, 0.61, np.float32([0.1, 0.2, 0.6, 0.9])])
def test_skip_layer_guidance_applies_within_its_limits(t):
    conditional, _ = halves(t)
    inside = (broadcast(np.float32(t)) >= np.float32(0.2)) & (broadcast(np.float32(t)) <= np.float32(0.6))
    found = jax.jit(slg(model, 2.5, low=0.2, high=0.6, perturbed=lambda _: poor))(X, jnp.float32(t), COND)
    close(found.x0, conditional + np.where(inside, 2.5 * (conditional - poor_x0(t)), 0))


def test_the_perturbed_network_is_not_evaluated_outside_of_the_limits():
    calls = []

    def perturbed(x, t, cond):
        jax.debug.callback(lambda t: calls.append(round(float(t), 3)), t)
        return poor(x, t, cond)

    guided = slg(model, low=0.3, high=0.6, perturbed=lambda _: perturbed)
    jax.block_until_ready(sampled(guided, "ddim", times=(0.9, 0.6, 0.4, 0.3, 0.2, 0.0)))
    jax.effects_barrier()
    assert sorted(calls, reverse=True) == [0.6, 0.4, 0.3]


@pytest.mark.parametrize("sigma", [0.0, -1.0])
def test_the_blur_must_be_positive(sigma):
    with refused("sigma"):
        seg(model, sigma=sigma, perturbed=lambda _: poor)


# In a generator.

DIT = {"name": "dit", "width": 8, "depth": 3, "num_heads": 2, "patch_size": 4}
SETTINGS = {"sampler": {"name": "ddim", "steps": 2}, "cond_drop_rate": 0.0}


@pytest.fixture(scope="module")
def dit(digits):
    """A small DiT, and parameters of which none is zero."""
    network = build("networks", DIT, shape=(8, 8, 1), num_classes=10)
    params = jax.jit(network.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    return network, {"net": jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape), params)}


def test_samples_with_perturbed_blocks(dit, ddpm, digits, mesh_of):
    """They are those of the functions; another scale does not recompile, and the model needs no dropped conditions."""
    (network, params), labels = dit, np.array([3, 1])
    guidance = {"name": "seg", "layers": (0, 2), "sigma": 1.0, "slg": {"layers": (1,), "high": 0.7}}
    generator = Generator(network, ddpm, digits.spec, mesh_of(1, 1, 1), guidance={**guidance, "scale": 1.0}, **SETTINGS)
    other = generator.with_settings(sampler=SETTINGS["sampler"], guidance={**guidance, "scale": 2.0})
    found = other(params, {"label": labels}, 2, seed=0)
    generator(params, {"label": labels}, 2, seed=0)
    assert generator.compilations == 1

    def perturbed(perturbation):
        return ddpm.denoiser(network.perturbed(perturbation), params)

    plain = ddpm.denoiser(network.apply, params)
    guided = slg(seg(plain, 2.0, (0, 2), 1.0, perturbed=perturbed), layers=(1,), high=0.7, perturbed=perturbed)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(2))

    @jax.jit
    def drawn(denoise_label):
        x = prior(ddpm.schedule, generator.times[0], keys, (8, 8, 1))
        denoise = bind(guided, {"label": denoise_label})
        return sample(denoise, ddpm.schedule, build("samplers", "ddim"), x, generator.times, keys)

    np.testing.assert_allclose(found, drawn(labels), rtol=1e-4, atol=1e-4 * abs(found).max())


@pytest.mark.parametrize(
    ("guidance", "field"),
    [
        ({"name": "pag", "layers": (3,)}, "guidance.pag.layers"),
        ({"name": "cfg", "slg": {"layers": (-1,)}}, "guidance.slg.layers"),
        ({"name": "seg", "sigma": 0.0}, "guidance.seg.sigma"),
        ({"name": "pag", "layers": 1}, "guidance.layers"),
        ({"name": "cfg", "pag": {"layer": (1,)}}, "guidance.pag.layer"),
    ],
)
def test_rejects_blocks_that_the_network_lacks(dit, ddpm, digits, mesh_of, guidance, field):
    with refused(field):
        Generator(dit[0], ddpm, digits.spec, mesh_of(1, 1, 1), guidance=guidance, **{**SETTINGS, "cond_drop_rate": 0.1})


def test_rejects_a_network_without_blocks(tiny_mlp, ddpm, digits, mesh_of):
    with refused("guidance.pag.layers"):
        Generator(tiny_mlp, ddpm, digits.spec, mesh_of(1, 1, 1), guidance={"name": "pag"}, **SETTINGS)


def test_a_scale_of_0_is_neutral_unless_it_is_around_other_guidance():
    assert is_neutral({"name": "pag", "scale": 0.0}) and not is_neutral({"name": "pag", "scale": 1.0})
    assert not is_neutral({"name": "cfg", "scale": 1.0, "pag": {}})
