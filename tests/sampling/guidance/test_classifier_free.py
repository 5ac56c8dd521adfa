"""Compares guidance by dropped conditions with the formulas of the papers, on closed-form denoisers.

One test with a network checks the batch of conditional and unconditional rows.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.interpolate
import scipy.ndimage

from diffusion.core.arrays import normal
from diffusion.core.build import build
from diffusion.core.types import Denoised
from diffusion.sampling.guidance import apg, cfg, cfg_pp, cfg_zero, fdg, interval
from diffusion.sampling.loop import bind
from tests.refusals import refused
from tests.sampling.guidance.closed_form import (
    COND,
    FLOW,
    METHODS,
    TIMES,
    VP,
    WITH_NEGATIVE,
    X,
    arguments_of,
    broadcast,
    close,
    dot,
    halves,
    model,
    sampled,
)

# The batch of conditional and unconditional rows, and the fields of every result.


@pytest.fixture(scope="module")
def case(ddpm, tiny_unet, tiny_params, digits_batch):
    denoise = ddpm.denoiser(tiny_unet.apply, tiny_params)
    x, cond = digits_batch["x"], digits_batch["cond"]
    keep = jnp.ones(16, bool)
    one = jax.jit(denoise)
    conditional = one(x, 0.5, {**cond, "keep": keep}).x0
    unconditional = one(x, 0.5, {**cond, "keep": ~keep}).x0
    guided = jax.jit(lambda x, scale: cfg(denoise, scale)(x, 0.5, cond).x0)
    return x, conditional, unconditional, guided


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 7.5])
def test_one_batch_equals_two_evaluations(case, scale):
    x, conditional, unconditional, guided = case
    expected = unconditional + scale * (conditional - unconditional)
    np.testing.assert_allclose(guided(x, scale), expected, rtol=1e-5, atol=1e-5 * (1 + scale))


def test_the_condition_matters(case):
    _, conditional, unconditional, _ = case
    assert abs(conditional - unconditional).max() > 1e-2


def test_the_scale_does_not_recompile(case):
    x, _, _, guided = case
    guided(x, 2.0)
    before = guided._cache_size()
    guided(x, 3.0)
    assert guided._cache_size() == before


@pytest.mark.parametrize("t", TIMES, ids=["scalar", "per-example"])
@pytest.mark.parametrize("name", WITH_NEGATIVE)
def test_rows_of_an_example_are_adjacent_and_the_second_is_unconditional(name, t):
    x, model_t, cond = arguments_of(METHODS[name], {**COND, "text": X[:, 0]}, t)
    np.testing.assert_array_equal(x, np.repeat(X, 2, axis=0))
    np.testing.assert_array_equal(model_t, np.repeat(np.broadcast_to(np.float32(t), 4), 2))
    np.testing.assert_array_equal(cond["keep"], [True, False] * 4)
    np.testing.assert_array_equal(cond["label"], np.repeat(COND["label"], 2))
    np.testing.assert_array_equal(cond["text"], np.repeat(X[:, 0], 2, axis=0))


@pytest.mark.parametrize("t", TIMES, ids=["scalar", "per-example"])
@pytest.mark.parametrize("name", METHODS)
def test_scale_1_is_conditional(name, t):
    conditional, unconditional = halves(t)
    guided = METHODS[name](model, 1.0)(X, t, COND)
    close(guided.x0, conditional)
    if name == "cfg_pp":
        close(guided.x0_for_eps, unconditional)
    else:
        assert guided.x0_for_eps is None


@pytest.mark.parametrize("t", TIMES, ids=["scalar", "per-example"])
@pytest.mark.parametrize("name", ["cfg", "cfg_pp", "autoguidance"])
@pytest.mark.parametrize("scale", [0.0, 0.6, 4.0])
def test_the_scale_interpolates_and_extrapolates(name, scale, t):
    conditional, unconditional = halves(t)
    close(METHODS[name](model, scale)(X, t, COND).x0, (1 - scale) * unconditional + scale * conditional)


@pytest.mark.parametrize("name", METHODS)
def test_conditional_and_log_variance_are_those_with_the_condition(name):
    conditional, _ = halves(0.35)
    guided = METHODS[name](model, 3.0)(X, 0.35, COND)
    assert abs(guided.x0 - conditional).max() > 0.1
    close(guided.conditional, conditional)
    close(guided.log_variance, conditional / 2)
    without = METHODS[name](lambda x, t, cond: Denoised(model(x, t, cond).x0), 3.0)(X, 0.35, COND)
    assert without.log_variance is None


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("t", TIMES, ids=["scalar", "each"])
def test_the_kind_of_prediction_is_preserved(name, t):
    """Consistency models can be guided, also within an interval."""

    def consistency_model(x, t, cond):
        return dataclasses.replace(model(x, t, cond), kind="consistency")

    guided = METHODS[name](consistency_model, 2.0)
    assert guided(X, t, COND).kind == "consistency"
    assert interval(guided, 0.3, 0.8, plain=consistency_model, schedule=FLOW)(X, t, COND).kind == "consistency"


def test_an_empty_negative_condition_is_unconditional():
    close(cfg(model, 3.0, negative={})(X, 0.35, COND).x0, cfg(model, 3.0)(X, 0.35, COND).x0)


@pytest.mark.parametrize("name", METHODS)
def test_examples_are_independent(name):
    guided, t = METHODS[name](model, 3.0), TIMES[1]
    others = np.array([1, 0, 2, 1])  # only the third stays in place
    among_others = guided(X[others], t[others], {"label": COND["label"][others]})
    close(among_others.x0[2], guided(X, t, COND).x0[2])


# Negative conditions.


@pytest.mark.parametrize("value", [5.0, np.float32([5.0, 4.0, 3.0, 2.5])], ids=["for all", "per-example"])
@pytest.mark.parametrize("name", WITH_NEGATIVE)
def test_a_negative_condition_replaces_the_unconditional_one(name, value):
    """`keep` must not drop it, and conditions that it does not name stay."""
    method = functools.partial(METHODS[name], negative={"label": value})
    _, _, cond = arguments_of(method, {**COND, "text": X[:, 0]})
    assert np.all(cond.get("keep", True))
    np.testing.assert_array_equal(cond["label"][0::2], COND["label"])
    np.testing.assert_array_equal(cond["label"][1::2], np.broadcast_to(value, 4))
    np.testing.assert_array_equal(cond["text"], np.repeat(X[:, 0], 2, axis=0))


@pytest.mark.parametrize("value", [5.0, np.float32([5.0, 4.0, 3.0, 2.5])], ids=["for all", "per-example"])
def test_cfg_with_a_negative_condition(value):
    conditional, negative = halves(0.35, value)
    guided = cfg(model, 3.0, negative={"label": value})(X, 0.35, COND)
    close(guided.x0, negative + 3 * (conditional - negative))
    close(guided.conditional, conditional)
    close(guided.log_variance, conditional / 2)


@pytest.mark.parametrize("name", WITH_NEGATIVE)
def test_rejects_a_negative_condition_that_the_model_lacks(name):
    with refused("guidance.negative"):
        METHODS[name](model, 3.0, negative={"colour": 1.0})(X, 0.35, COND)


# apg


@pytest.mark.parametrize("t", TIMES, ids=["scalar", "per-example"])
@pytest.mark.parametrize("eta", [0.0, 0.4])
@pytest.mark.parametrize("norm", [2.5, np.inf])
def test_apg_formula(eta, norm, t):
    """arXiv 2410.02416 without momentum; one of the norms shortens some of the examples, the other none."""
    conditional, unconditional = halves(t)
    difference = conditional - unconditional
    length = np.sqrt(dot(difference, difference))
    assert (length > 2.5).any() and (length < 2.5).any()
    difference = difference * np.minimum(1, norm / length)
    unit = conditional / np.sqrt(dot(conditional, conditional))
    parallel = dot(difference, unit) * unit
    expected = conditional + (4.0 - 1) * ((difference - parallel) + eta * parallel)
    close(apg(model, 4.0, eta, norm)(X, t, COND).x0, expected)


@pytest.mark.parametrize("scale", [0.0, 1.0, 4.0])
def test_apg_with_eta_1_is_cfg(scale):
    close(apg(model, scale, eta=1.0)(X, 0.35, COND).x0, cfg(model, scale)(X, 0.35, COND).x0)


@pytest.mark.parametrize("norm", [0.5, np.inf])
def test_apg_is_orthogonal_to_the_conditional_by_default(norm):
    conditional, _ = halves(0.35)
    update = apg(model, 4.0, norm=norm)(X, 0.35, COND).x0 - conditional
    assert abs(update).max() > 0.1
    close(dot(update, conditional), 0)


def test_apg_bounds_the_difference_by_its_norm():
    conditional, unconditional = halves(0.35)
    full = np.sqrt(dot(conditional - unconditional, conditional - unconditional))
    bound = np.median(full)
    update = apg(model, 2.0, eta=1.0, norm=bound)(X, 0.35, COND).x0 - conditional
    close(np.sqrt(dot(update, update)), np.minimum(full, bound))


def test_apg_and_cfg_zero_are_finite_if_the_condition_has_no_effect():
    """Both divide by lengths that are 0 here."""

    def same(x, t, cond):
        return Denoised(jnp.zeros_like(x))

    x = jnp.zeros((4, 3, 2))
    for guided in (apg(same, 4.0, norm=2.0), apg(same, 4.0), cfg_zero(same, 4.0, schedule=FLOW)):
        np.testing.assert_array_equal(guided(x, 0.35, COND).x0, 0)


# cfg_zero


@pytest.mark.parametrize("t", [*TIMES, 1.0], ids=["scalar", "per-example", "pure noise"])
@pytest.mark.parametrize("scale", [0.0, 4.0])
def test_cfg_zero_formula_on_the_straight_path(scale, t):
    """arXiv 2503.18886, with v = eps - x0: v = (1 - w) s* v_u + w v_c, s* = <v_c, v_u> / <v_u, v_u>."""
    time = broadcast(t)
    conditional, unconditional = ((X - (1 - time) * x0) / time - x0 for x0 in halves(t))
    projection = dot(conditional, unconditional) / dot(unconditional, unconditional)
    assert abs(projection - 1).max() > 0.1
    velocity = (1 - scale) * projection * unconditional + scale * conditional
    close(cfg_zero(model, scale, schedule=FLOW)(X, t, COND).x0, X - time * velocity)


def test_cfg_zero_uses_the_velocity_of_any_schedule():
    t = 0.3005  # midway between two points of the table, where log-SNR is linear
    below, above = VP.table[299:301]
    alpha, sigma = (1 / np.sqrt(1 + np.exp(sign * (below + above) / 2)) for sign in (-1, 1))
    slope = 1000 * (above - below) / 2
    d_alpha, d_sigma = slope * alpha * sigma**2, -slope * sigma * alpha**2
    conditional, unconditional = (d_alpha * x0 + d_sigma * (X - alpha * x0) / sigma for x0 in halves(t))
    projection = dot(conditional, unconditional) / dot(unconditional, unconditional)
    velocity = projection * unconditional + 4 * (conditional - projection * unconditional)
    expected = (d_sigma * X - sigma * velocity) / (alpha * d_sigma - sigma * d_alpha)
    close(jax.jit(cfg_zero(model, 4.0, schedule=VP))(X, t, COND).x0, expected, 1e-4)


def test_cfg_zero_does_not_move_x_above_a_time():
    ddim = build("samplers", "ddim")
    denoise = cfg_zero(model, 4.0, zero_above=0.6, schedule=FLOW)
    guided = cfg_zero(model, 4.0, schedule=FLOW)

    def step(denoise, t):
        return ddim.step(X, (), bind(denoise, COND), FLOW, jnp.asarray(t), jnp.asarray(t - 0.1), None)[0]

    close(step(denoise, 0.601), X)
    close(step(denoise, 1.0), X)
    assert abs(step(denoise, 0.6) - X).max() > 0.1
    close(step(denoise, 0.6), step(guided, 0.6))
    above = np.array([False, True, False, True])
    mixed = denoise(X, np.where(above, 0.7, 0.5), COND).x0
    close(mixed[above], X[above])
    close(mixed[~above], guided(X, 0.5, COND).x0[~above])


def test_cfg_zero_does_not_move_x_on_a_curved_path():
    """The velocity is 0, so that a step of Euler's method in time does not move x."""
    euler = build("samplers", {"name": "euler", "coordinate": "time"})
    denoise = bind(cfg_zero(model, 4.0, zero_above=0.2, schedule=VP), COND)
    step = jax.jit(lambda t, s: euler.step(X, (), denoise, VP, t, s, None)[0])
    close(step(0.3, 0.25), X)
    assert abs(step(0.2, 0.15) - X).max() > 1e-2


# fdg

IMAGES = np.random.default_rng(3).normal(size=(2, 2, 8, 6, 3)).astype(np.float32)  # x0 with and without the condition


def of_images(x, t, cond):
    """Returns the first of `IMAGES` where the condition is kept, and the second elsewhere."""
    return Denoised(
        jnp.where(cond["keep"][:, None, None, None], np.repeat(IMAGES[0], 2, 0), np.repeat(IMAGES[1], 2, 0))
    )


def low_frequencies(image):
    """The lower level of a Laplacian pyramid, doubled: both by blurs that mirror the image at its last pixel."""
    for axis in (0, 1):
        image = scipy.ndimage.correlate1d(image, np.array([1, 4, 6, 4, 1]) / 16, axis, mode="mirror")
        pairs = np.moveaxis(image, axis, 0)
        half = (pairs[0::2] + pairs[1::2]) / 2
        places = (np.arange(len(pairs)) + 0.5) / 2 - 0.5
        doubled = scipy.interpolate.interp1d(np.arange(len(half)), half, axis=0)(np.clip(places, 0, len(half) - 1))
        image = np.moveaxis(doubled, 0, axis)
        image = scipy.ndimage.correlate1d(image, np.array([1, 4, 6, 4, 1]) / 16, axis, mode="mirror")
    return image


@pytest.mark.parametrize(("scale", "low_scale"), [(4.0, 1.0), (1.0, 3.0), (5.0, 5.0)])
def test_fdg_formula(scale, low_scale):
    """arXiv 2506.19713: each level of the pyramid is guided with its own scale."""
    found = fdg(of_images, scale, low_scale)(jnp.zeros((2, 8, 6, 3)), 0.5, {"label": np.zeros(2, int)})
    for ours, conditional, unconditional in zip(found.x0, *np.float64(IMAGES), strict=True):
        low, low_uncond = low_frequencies(conditional), low_frequencies(unconditional)
        high, high_uncond = conditional - low, unconditional - low_uncond
        expected = low_uncond + low_scale * (low - low_uncond) + high_uncond + scale * (high - high_uncond)
        close(ours, expected)
        if scale == low_scale:
            close(ours, unconditional + scale * (conditional - unconditional))
    close(found.conditional, IMAGES[0])


@pytest.mark.parametrize("size", [2, 4, 16])
def test_the_low_frequencies_of_a_constant_are_the_constant(size):
    def constant(x, t, cond):
        return Denoised(jnp.where(cond["keep"][:, None, None, None], 1.0, 0.0) + 0 * x)

    close(fdg(constant, 9.0, 2.0)(jnp.zeros((1, size, 4, 1)), 0.5, {"label": np.zeros(1, int)}).x0, 2.0)


@pytest.mark.parametrize("shape", [(2, 5, 4, 1), (2, 4, 5, 1), (2, 4)])
def test_fdg_requires_images_of_even_size(shape):
    with refused("guidance.name"):
        fdg(model)(jnp.zeros(shape), 0.5, {"label": np.zeros(2)})


# cfg_pp


@pytest.mark.parametrize("schedule", [VP, FLOW], ids=["vp", "flow"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_cfg_pp_formula_on_ddim(schedule, eta):
    """arXiv 2406.08070; with eta, the remaining noise is the unconditional one too."""
    t, s, keys = jnp.asarray(0.6), jnp.asarray(0.45), jax.random.split(jax.random.key(0), 4)
    alpha_t, sigma_t, alpha_s, sigma_s = (float(f(u)) for u in (t, s) for f in (schedule.alpha, schedule.sigma))
    conditional, unconditional = halves(0.6)
    x0 = unconditional + 0.8 * (conditional - unconditional)
    noise = (X - alpha_t * unconditional) / sigma_t
    fresh = eta * sigma_s / sigma_t * np.sqrt(sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)
    expected = alpha_s * x0 + np.sqrt(sigma_s**2 - fresh**2) * noise + fresh * normal(keys, (3, 2))
    ddim = build("samplers", {"name": "ddim", "eta": eta})
    step = jax.jit(lambda t, s: ddim.step(X, (), bind(cfg_pp(model, 0.8), COND), schedule, t, s, keys)[0])
    close(step(t, s), expected)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpm_solver_pp", "deis", "ipndm"])
def test_samplers_with_separate_eps_support_cfg_pp(sampler):
    guided, as_cfg = (sampled(method(model, 0.8), sampler) for method in (cfg_pp, cfg))
    assert np.isfinite(guided).all()
    assert abs(guided - as_cfg).max() > 1e-2


@pytest.mark.parametrize("sampler", ["heun", "unipc", "ancestral", {"name": "euler", "coordinate": "time"}])
def test_other_samplers_reject_cfg_pp(sampler):
    with refused("guidance.name"):
        sampled(cfg_pp(model, 0.8), sampler)
