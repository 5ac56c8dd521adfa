"""Changes of any guidance: rescaling, intervals, thresholds; and which numbers are traced."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import derivative
from diffusion.core.build import build
from diffusion.core.types import Denoised
from diffusion.sampling.guidance import (
    cfg,
    cfg_pp,
    interval,
    rescale,
    scale_schedule,
    threshold,
)
from diffusion.sampling.loop import bind
from tests.refusals import refused
from tests.sampling.guidance.closed_form import (
    COND,
    FLOW,
    METHODS,
    TIMES,
    VP,
    X,
    broadcast,
    close,
    halves,
    model,
    sampled,
)

# scale_schedule


@pytest.mark.parametrize("t", [0.0, 0.5, 1.0, *TIMES], ids=str)
@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_scale_schedule_formula(shape, t):
    """arXiv 2404.13040, whose w multiplies the difference from the conditional prediction."""
    weight = {"linear": 2 * (1 - broadcast(np.float64(t))), "cosine": 1 + np.cos(np.pi * broadcast(np.float64(t)))}[
        shape
    ]
    conditional, unconditional = halves(t)
    found = scale_schedule(cfg(model, 4.0), shape)(X, t, COND)
    close(found.x0, conditional + weight * (4 - 1) * (conditional - unconditional))
    close(found.conditional, conditional)


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_mean_of_a_schedule_is_the_scale_itself(shape):
    times = (np.arange(1000) + 0.5) / 1000
    constant = lambda x, t, cond: Denoised(jnp.ones_like(x), conditional=jnp.zeros_like(x))  # noqa: E731
    weights = scale_schedule(constant, shape)(jnp.zeros((1000, 1)), jnp.float32(times), {}).x0
    assert abs(weights.mean() - 1) < 1e-5 and (np.diff(weights[:, 0]) < 0).all()


def test_scale_schedule_requires_guidance():
    with refused("guidance.scale_schedule"):
        scale_schedule(model)(X, 0.35, COND)


# rescale


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", METHODS)
def test_rescale_formula(name, factor):
    """Eq. 15 and 16 of arXiv 2305.08891, with the standard deviations of each example."""
    guided = METHODS[name](model, 5.0)(X, 0.35, COND)
    rescaled = rescale(METHODS[name](model, 5.0), factor)(X, 0.35, COND)
    std_cond, std = (np.std(y, axis=(1, 2), keepdims=True) for y in (guided.conditional, guided.x0))
    assert np.ptp(std_cond / std) > 0.05
    expected = factor * (guided.x0 * std_cond / std) + (1 - factor) * guided.x0
    close(rescaled.x0, expected)
    if factor == 1:
        close(np.std(rescaled.x0, axis=(1, 2), keepdims=True), std_cond)
    for field in ("conditional", "log_variance", "x0_for_eps"):
        np.testing.assert_array_equal(getattr(rescaled, field), getattr(guided, field))


@pytest.mark.parametrize("output", ["eps", "v", "velocity"])
def test_rescale_of_the_output_of_a_network(output):
    """The guided output of a network is rescaled as diffusers does, and x0 is what it stands for."""
    alpha, sigma = np.float64(VP.alpha(0.35)), np.float64(VP.sigma(0.35))
    d_alpha, d_sigma = (float(derivative(of, jnp.float32(0.35))) for of in (VP.alpha, VP.sigma))
    a, b = {"eps": (0, 1), "v": (-sigma, alpha), "velocity": (d_alpha, d_sigma)}[output]
    denoised = cfg(model, 5.0)(X, 0.35, COND)
    of_cond, guided = (a * x0 + b * (X - alpha * x0) / sigma for x0 in (denoised.conditional, denoised.x0))
    ratio = np.std(of_cond, axis=(1, 2), keepdims=True) / np.std(guided, axis=(1, 2), keepdims=True)
    expected = 0.7 * ratio * guided + 0.3 * guided
    found = rescale(cfg(model, 5.0), 0.7, output, schedule=VP)(X, 0.35, COND).x0
    np.testing.assert_allclose(a * found + b * (X - alpha * found) / sigma, expected, rtol=1e-4, atol=1e-4)
    assert abs(found - rescale(cfg(model, 5.0), 0.7)(X, 0.35, COND).x0).max() > 1e-2


def test_rescale_requires_guidance():
    with refused("guidance.rescale"):
        rescale(model)(X, 0.35, COND)
    with refused("output"):
        rescale(cfg(model, 5.0), output="eps", schedule=FLOW)


# interval


def between(low, high, unit="t", schedule=VP, method=cfg):
    """Returns guidance of scale 3 within an interval."""
    return interval(method(model, 3.0), low, high, unit, plain=model, schedule=schedule)


def guided_and_plain(t, method=cfg):
    """Returns the guided and the plain prediction, between which `between` chooses."""
    return method(model, 3.0)(X, t, COND), model(X, t, COND)


@pytest.mark.parametrize("t", [0.0, 0.1, 0.24, 0.25, 0.5, 0.75, 0.76, 1.0])
def test_inside_the_interval_is_guided_and_outside_plain(t):
    """arXiv 2404.07724; both ends are included, in the float32 of sampling."""
    guided, plain = guided_and_plain(jnp.float32(t))
    found = jax.jit(between(0.25, 0.75))(X, jnp.float32(t), COND)
    expected = guided if 0.25 <= t <= 0.75 else plain
    close(found.x0, expected.x0)
    close(found.conditional, plain.x0)
    close(found.log_variance, plain.log_variance)
    assert abs(guided.x0 - plain.x0).max() > 0.1


@pytest.mark.parametrize("t", [0.0, 1.0])
@pytest.mark.parametrize("unit", ["t", "sigma"])
def test_the_default_interval_is_everywhere(unit, t):
    """Also where sigma / alpha is infinite."""
    found = interval(cfg(model, 3.0), unit=unit, plain=model, schedule=FLOW)(X, jnp.float32(t), COND)
    close(found.x0, guided_and_plain(jnp.float32(t))[0].x0)


def test_the_ends_of_an_interval_in_sigma_are_included():
    """On the straight path, sigma / alpha is exactly 1 at t = 1/2."""
    guided, plain = guided_and_plain(0.5)
    for low, high, expected in ((1.0, 2.0, guided), (0.5, 1.0, guided), (1.01, 2.0, plain), (0.5, 0.99, plain)):
        close(between(low, high, "sigma", FLOW)(X, 0.5, COND).x0, expected.x0)


@pytest.mark.parametrize("unit", ["t", "sigma"])
def test_the_interval_applies_per_example(unit):
    t = np.float32([0.1, 0.3, 0.5, 0.9])
    level = t if unit == "t" else np.asarray(VP.sigma(t) / VP.alpha(t))
    low, high = 0.99 * level[1], 1.01 * level[2]  # so near that only the exact level is inside
    guided, plain = guided_and_plain(t)
    chosen = jax.jit(between(low, high, unit))
    found = chosen(X, t, COND)
    inside = np.array([False, True, True, False]).reshape(4, 1, 1)
    close(found.x0, np.where(inside, guided.x0, plain.x0))
    close(found.conditional, plain.x0)
    close(found.log_variance, plain.log_variance)
    for i in range(4):  # with one time for all examples
        close(chosen(X, t[i], COND).x0[i], found.x0[i])


def test_outside_the_interval_the_guided_branch_does_not_run():
    """In the loop of a sampler, the model evaluates 2B rows inside and B rows outside."""
    calls = []

    def denoise(x, t, cond):
        jax.debug.callback(lambda t: calls.append((round(float(t), 3), x.shape[0])), jnp.ravel(t)[0])
        return model(x, t, cond)

    chosen = interval(cfg(denoise, 3.0), 0.3, 0.6, plain=denoise, schedule=FLOW)
    jax.block_until_ready(sampled(chosen, "ddim", times=(0.9, 0.6, 0.4, 0.3, 0.2, 0.0)))
    jax.effects_barrier()
    assert sorted(calls, reverse=True) == [(0.9, 4), (0.6, 8), (0.4, 8), (0.3, 8), (0.2, 4)]


@pytest.mark.parametrize("t", [0.1, 0.5, np.float32([0.1, 0.3, 0.5, 0.9])], ids=["outside", "inside", "per-example"])
def test_cfg_pp_is_plain_outside_of_an_interval(t):
    """The noise is that of the plain x0 there."""
    guided, plain = guided_and_plain(t, cfg_pp)
    inside = (broadcast(t) > 0.2) & (broadcast(t) < 0.6)
    found = between(0.2, 0.6, method=cfg_pp)(X, t, COND)
    close(found.x0, np.where(inside, guided.x0, plain.x0))
    close(found.x0_for_eps, np.where(inside, guided.x0_for_eps, plain.x0))
    close(found.conditional, plain.x0)


def test_samplers_support_cfg_pp_in_an_interval():
    """No step is inside, so that the samples are those without guidance."""
    close(sampled(between(0.61, 0.89, method=cfg_pp), "ddim"), sampled(model, "ddim"))


# threshold


def far(x, t, cond):
    """A model whose x0 exceeds the range of the data, except for the last example."""
    return Denoised(X * np.float32([5.0, 2.0, 1.0, 0.1]).reshape(4, 1, 1), X, conditional=2 * X, x0_for_eps=3 * X)


@pytest.mark.parametrize("limit", [1.0, 0.5])
def test_static_thresholding_clips(limit):
    close(threshold(far, limit=limit)(X, 0.35, COND).x0, np.clip(far(X, 0.35, COND).x0, -limit, limit))


@pytest.mark.parametrize("limit", [1.0, 0.5])
@pytest.mark.parametrize("percentile", [0.6, 0.95])
def test_dynamic_thresholding_formula(percentile, limit):
    """Section 2.3 of arXiv 2205.11487, for data in [-limit, limit].

    x0 is clipped to the percentile s of the example's |x0| and divided by s, if s is above the limit.
    """
    x0 = far(X, 0.35, COND).x0
    found = np.asarray(threshold(far, percentile, limit)(X, 0.35, COND).x0)
    for before, after in zip(x0, found, strict=True):
        s = max(np.quantile(abs(before), percentile), limit)
        close(after, np.clip(before, -s, s) / s * limit)
    np.testing.assert_array_equal(found[3], x0[3])  # within the range, and therefore unchanged
    assert abs(found).max() <= limit * (1 + 1e-6)


def test_dynamic_thresholding_with_a_highest_value():
    """The quantile s is at most `sample_max_value`; 1 is static thresholding."""
    x0 = far(X, 0.35, COND).x0
    close(threshold(far, 0.9, sample_max_value=1.0)(X, 0.35, COND).x0, np.clip(x0, -1, 1))
    s = np.clip(np.quantile(abs(x0), 0.9, axis=(1, 2), keepdims=True), 1, 1.7)
    assert (s == 1.7).any() and (s == 1).any()
    close(threshold(far, 0.9, sample_max_value=1.7)(X, 0.35, COND).x0, np.clip(x0, -s, s) / s)


@pytest.mark.parametrize("sampler", ["ddim", {"name": "ddim", "eta": 1.0}, "euler"], ids=str)
def test_threshold_may_keep_the_noise(sampler):
    """The step uses eps of x0 before it is clipped (DDIM's eq. 12), and guidance's own eps if there is one."""
    x0, clipped = far(X, 0.35, COND).x0, np.clip(far(X, 0.35, COND).x0, -0.8, 0.8)
    kept = threshold(lambda *args: dataclasses.replace(far(*args), x0_for_eps=None), limit=0.8, keep_noise=True)
    keys = jax.random.split(jax.random.key(0), 4)
    t, s = jnp.float32(0.6), jnp.float32(0.4)
    solver = build("samplers", sampler)
    found, estimate, _ = solver.step(X, (), bind(kept, COND), VP, t, s, keys)
    (alpha, sigma), (alpha_s, sigma_s) = ((VP.alpha(u), VP.sigma(u)) for u in (t, s))
    fresh = getattr(solver, "eta", 0) * sigma_s / sigma * np.sqrt(sigma**2 - (alpha * sigma_s / alpha_s) ** 2)
    noise = fresh * jax.vmap(lambda key: jax.random.normal(key, X.shape[1:]))(keys)
    close(found, alpha_s * clipped + np.sqrt(sigma_s**2 - fresh**2) * (X - alpha * x0) / sigma + noise)
    close(estimate, clipped)
    close(threshold(far, keep_noise=True)(X, 0.35, COND).x0_for_eps, 3 * X)


def test_other_samplers_reject_kept_noise():
    with refused("guidance.name") as error:
        sampled(threshold(model, limit=0.8, keep_noise=True), "unipc")
    assert "keep_noise" in str(error.value)


@pytest.mark.parametrize("percentile", [1.0, 0.9])
def test_threshold_keeps_the_other_fields(percentile):
    found, given = threshold(far, percentile)(X, 0.35, COND), far(X, 0.35, COND)
    for field in ("log_variance", "conditional", "x0_for_eps"):
        assert getattr(found, field) is not None
        np.testing.assert_array_equal(getattr(found, field), getattr(given, field))


@pytest.mark.parametrize("percentile", [0.0, -0.5, 1.01, 99.5, float("nan")])
def test_rejects_a_percentile_outside_of_0_to_1(percentile):
    with refused("percentile"):
        threshold(model, percentile)


# Nested guidance.


@pytest.mark.parametrize("t", [0.1, 0.5, TIMES[1]], ids=["outside", "inside", "per-example"])
def test_guidance_nests(t):
    """Guidance, interval and threshold nest. `rescale` has no effect outside the interval, so both orders agree."""
    conditional, unconditional = halves(t)
    guided = unconditional + 5 * (conditional - unconditional)
    shrink = 0.3 + 0.7 * np.std(conditional, axis=(1, 2), keepdims=True) / np.std(guided, axis=(1, 2), keepdims=True)
    inside = (broadcast(t) >= 0.2) & (broadcast(t) <= 0.5)
    expected = np.where(inside, guided * shrink, conditional)
    given = {"low": 0.2, "high": 0.5, "plain": model, "schedule": VP}
    for nested in (interval(rescale(cfg(model, 5.0)), **given), rescale(interval(cfg(model, 5.0), **given))):
        close(nested(X, t, COND).x0, expected)
        clipped = threshold(nested, limit=0.8)(X, t, COND)
        close(clipped.x0, np.clip(expected, -0.8, 0.8))
        close(clipped.conditional, conditional)
    assert abs(expected).max() > 0.8
