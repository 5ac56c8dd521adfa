"""Compares every guidance function with the formula of its paper, on closed-form denoisers.

One test with a network checks the batch of conditional and unconditional rows.
"""

import dataclasses
import functools
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import expand, kept, normal, sample_keys
from diffusion.core.build import build, build_network
from diffusion.core.types import Array, ArraySpec, ConditionSpec, Denoised, Spec, Text, class_labels
from diffusion.pipelines.generator import Generator, is_neutral, structure
from diffusion.sampling import guidance as guidances
from diffusion.sampling.guidance import (
    apg,
    autoguidance,
    cfg,
    cfg_per_condition,
    cfg_pp,
    cfg_zero,
    guidance_embedding,
    interval,
    rescale,
    threshold,
)
from diffusion.sampling.loop import bind, prior, sample
from tests.refusals import refused

FLOW, VP = build("schedules", "flow"), build("schedules", "vp")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3, 2)).astype(np.float32)
COND = {"label": np.float32([0.0, 0.7, 1.4, 2.6])}
NULL = -2.0  # the label of the model where keep is False
TIMES = [0.35, np.float32([0.2, 0.45, 0.7, 0.95])]


def x0_of(x, t, level):
    """Returns the x0 of the model; it is nonlinear in every argument, so that a wrong argument changes the result."""
    return jnp.cos(x + expand(jnp.asarray(level + 3.0 * t), x))


def model(x, t, cond):
    x0 = x0_of(x, t, jnp.where(kept(cond, "label"), cond["label"], NULL))
    return Denoised(x0, log_variance=x0 / 2)


def worse(x, t, cond):
    """The worse model of `autoguidance`: `model` without its condition."""
    return model(x, t, {**cond, "keep": jnp.zeros(x.shape[0], bool)})


METHODS = {
    "cfg": cfg,
    "apg": apg,
    "cfg_zero": functools.partial(cfg_zero, schedule=FLOW),
    "cfg_pp": cfg_pp,
    "autoguidance": functools.partial(autoguidance, worse=worse),
}
WITH_NEGATIVE = ["cfg", "apg", "cfg_zero", "cfg_pp"]


def halves(t, level=NULL):
    """Returns x0 with and without the condition, as float64."""
    return np.float64(x0_of(X, t, COND["label"])), np.float64(x0_of(X, t, level))


def arguments_of(method, cond=COND, t=0.35):
    """Returns the arguments x, t and cond of the single model call of a guided evaluation."""
    calls = []

    def denoise(x, t, cond):
        calls.append((x, t, cond))
        return model(x, t, cond)

    method(denoise)(X, t, cond)
    (call,) = calls
    return call


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def dot(a, b):
    return np.sum(a * b, axis=(1, 2), keepdims=True)


def broadcast(t):
    return np.broadcast_to(t, 4).reshape(4, 1, 1)


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


def sampled(denoise, sampler, times=(0.9, 0.6, 0.3, 0.0)):
    sampler, key = build("samplers", sampler), jax.random.key(0)
    return jax.jit(lambda times: sample(bind(denoise, COND), FLOW, sampler, X, times, key))(jnp.asarray(times))


@pytest.mark.parametrize("sampler", ["ddim", "euler", "euler_ancestral", "dpm_solver_pp", "deis", "ipndm"])
def test_samplers_with_separate_eps_support_cfg_pp(sampler):
    guided, as_cfg = (sampled(method(model, 0.8), sampler) for method in (cfg_pp, cfg))
    assert np.isfinite(guided).all()
    assert abs(guided - as_cfg).max() > 1e-2


@pytest.mark.parametrize("sampler", ["heun", "unipc", "ancestral", {"name": "euler", "coordinate": "time"}])
def test_other_samplers_reject_cfg_pp(sampler):
    with refused("guidance.name"):
        sampled(cfg_pp(model, 0.8), sampler)


# autoguidance


def test_autoguidance_evaluates_both_models_at_the_same_arguments():
    calls = []

    def recorded(function):
        def denoise(x, t, cond):
            calls.append((x, t, cond))
            return Denoised(function(x, t, cond), log_variance=function(x, t, cond))

        return denoise

    def good(x, t, cond):
        return x * expand(t * cond["label"], x)

    def bad(x, t, cond):
        return jnp.sin(x) + expand(t + cond["label"] * cond["keep"], x)

    t, cond = TIMES[1], {**COND, "keep": np.array([True, False, True, False])}
    guided = autoguidance(recorded(good), 2.5, worse=recorded(bad))(X, t, cond)
    rows = [v.reshape(4, 1, 1) for v in (t, cond["label"], cond["keep"])]
    better, poor = X * rows[0] * rows[1], np.sin(X) + rows[0] + rows[1] * rows[2]
    close(guided.x0, poor + 2.5 * (better - poor))
    close(guided.conditional, better)
    close(guided.log_variance, better)
    for call in calls:
        assert call[0] is X and call[1] is t and call[2] is cond
    assert len(calls) == 2


# guidance_embedding


def distilled(x, t, cond):
    """A model that is conditioned on the guidance scale."""
    return Denoised(X * expand(cond["guidance_scale"] * cond["label"] * t, X))


@pytest.mark.parametrize("scale", [1.0, 2.5, np.float32([0.5, 1.0, 2.0, 4.0])], ids=["1", "2.5", "per-example"])
def test_guidance_embedding_adds_only_the_scale(scale):
    """There is one evaluation, with the other arguments unchanged, for a scale of 1 too."""
    x, t, cond = arguments_of(lambda denoise: guidance_embedding(denoise, scale), {**COND, "text": X[:, 0]})
    assert x is X and t == 0.35 and cond.keys() == {"label", "text", "guidance_scale"}
    assert cond["label"] is COND["label"] and cond["guidance_scale"].dtype == np.float32
    np.testing.assert_array_equal(cond["guidance_scale"], np.broadcast_to(np.float32(scale), 4))


def generator(network, objective, cond_drop_rate, num_classes, mesh, scale):
    spec = Spec(ArraySpec((2,), "points"), class_labels(num_classes))
    return Generator(network, objective, spec, mesh, sampler={"name": "ddim", "steps": 2},
                  guidance={"name": "guidance_embedding", "scale": scale}, cond_drop_rate=cond_drop_rate)  # fmt: skip


@pytest.mark.parametrize("num_classes", [0, 3])
def test_guidance_embedding_requires_neither_classes_nor_dropped_conditions(num_classes, ddpm, mesh_of):
    """A scale of 1 is not plain sampling, because the network receives it like any other scale."""
    spec = {"name": "mlp", "width": 8, "depth": 1, "scalar_conditions": ("guidance_scale",)}
    inner = build("networks", spec, shape=(2,), num_classes=num_classes)
    conditions = []

    def apply(params, x, c_noise, cond, *, key=None):
        conditions.append(sorted(cond))
        return inner.apply(params, x, c_noise, cond, key=key)

    network = dataclasses.replace(inner, apply=apply)
    for scale in (1.0, 2.5):
        assert not is_neutral({"name": "guidance_embedding", "scale": scale})
        generator(network, ddpm, 0.0, num_classes, mesh_of(1, 1, 1), scale)
    expected = ["guidance_scale", "label"] if num_classes else ["guidance_scale"]
    assert conditions and all(names == expected for names in conditions)


def test_guidance_embedding_requires_a_network_with_the_scale_as_input(ddpm, mesh_of):
    network = build("networks", {"name": "mlp", "width": 8, "depth": 1}, shape=(2,))
    with refused("network.scalar_conditions"):
        generator(network, ddpm, 0.1, 0, mesh_of(1, 1, 1), 1.0)


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


def test_rescale_requires_guidance():
    with refused("guidance.rescale"):
        rescale(model)(X, 0.35, COND)


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


# One scale per condition.

BOTH = {
    "image": np.float32([[0.1], [0.4], [0.9], [1.6]]),
    "text": Text(np.float32(RNG.normal(size=(4, 2, 1))), np.ones((4, 2), bool)),
}


def model_of_two(x, t, cond):
    """x0 depends on both conditions and on their combination."""
    image = jnp.where(kept(cond, "image"), cond["image"][:, 0], NULL)
    text = jnp.where(kept(cond, "text"), cond["text"].tokens.sum(axis=(1, 2)), 0.3)
    x0 = x0_of(x, t, image + image * text)
    return Denoised(x0, log_variance=x0 / 2)


@pytest.mark.parametrize("t", TIMES, ids=["one time", "a time per example"])
@pytest.mark.parametrize("scales", [{"image": 1.5, "text": 7.5}, {"text": 7.5, "image": 1.5}, {"image": 1, "text": 1}])
def test_one_scale_per_condition(scales, t):
    first, second = scales
    x0 = [
        model_of_two(X, t, {**BOTH, "keep": {first: np.full(4, one), second: np.full(4, both)}}).x0
        for one, both in ((False, False), (True, False), (True, True))
    ]
    found = cfg_per_condition(model_of_two, scales)(X, t, BOTH)
    expected = x0[0] + scales[first] * (x0[1] - x0[0]) + scales[second] * (x0[2] - x0[1])
    np.testing.assert_array_equal(found.x0, expected)
    np.testing.assert_array_equal(found.conditional, x0[2])
    np.testing.assert_array_equal(found.log_variance, x0[2] / 2)


@pytest.mark.parametrize("scales", [{"image": 2.0}, {"image": 2.0, "text": 2.0, "label": 1.0}])
def test_every_condition_must_have_a_scale(scales):
    with refused("guidance.scales"):
        cfg_per_condition(model_of_two, scales)(X, 0.5, BOTH)


def test_the_scales_and_their_order_in_a_sampler(ddpm, mesh_of):
    """Other scales share the compiled function; another order does not."""
    conditions = {"a": ConditionSpec("vector", (2,)), "b": ConditionSpec("vector", (3,))}
    spec = Spec(ArraySpec((2,), "points"), conditions)
    network = build_network({"name": "mlp", "width": 8, "depth": 1}, spec)
    params = {"net": jax.tree.map(lambda leaf: leaf + 0.3, jax.jit(network.init)(jax.random.key(0)))}
    settings = {"sampler": {"name": "ddim", "steps": 2}}

    def sections(**scales):
        return {**settings, "guidance": {"name": "cfg_per_condition", "scales": scales}}

    cond = jax.tree.map(lambda value: value + 1, spec.zeros(2))
    first = Generator(network, ddpm, spec, mesh_of(1, 1, 1), cond_drop_rate=0.1, **sections(b=3.0, a=1.0))
    found = [first.with_settings(**sections(**scales))(params, cond, 2, seed=0)
             for scales in ({"b": 3.0, "a": 1.0}, {"b": 1.0, "a": 3.0})]  # fmt: skip
    assert first.compilations == 1 and abs(found[0] - found[1]).max() > 1e-4
    for scales, x in zip(({"b": 3.0, "a": 1.0}, {"b": 1.0, "a": 3.0}), found, strict=True):
        schedule, keys = ddpm.schedule, sample_keys(jax.random.key(0), jnp.arange(2))
        denoise = bind(cfg_per_condition(ddpm.denoiser(network.apply, params), scales), cond)
        start = prior(schedule, first.times[0], keys, (2,))
        expected = sample(denoise, schedule, build("samplers", "ddim"), start, first.times, keys)
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)
    orders = [structure(sections(**scales)["guidance"]) for scales in ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0})]
    assert orders[0] != orders[1] == structure(sections(b=5.0, a=1.0)["guidance"])


def test_a_negative_text():
    negative = Text(np.float32([[0.5], [0.2]]), np.ones(2, bool))
    found = cfg(model_of_two, 3.0, negative={"text": negative})(X, 0.35, BOTH).x0
    rows = jax.tree.map(lambda value: np.stack([value] * 4), negative)
    with_text, without = (model_of_two(X, 0.35, {**BOTH, "text": text}).x0 for text in (BOTH["text"], rows))
    np.testing.assert_array_equal(found, without + 3.0 * (with_text - without))


def test_texts_that_differ_in_one_token_are_different_structures():
    """Such texts have the same `repr` as NumPy arrays, which leaves out the middle."""
    texts = [Text(np.eye(64, dtype=np.float32) * scale, np.ones(64, bool)) for scale in (1, 1)]
    texts[1].tokens[30, 30] = 2
    keys = [repr(structure({"name": "cfg", "scale": 2.0, "negative": {"text": text}})) for text in texts]
    assert keys[0] != keys[1]


# Traced keywords.

ON = {"plain": model, "schedule": VP}
TRACED = {
    "cfg": (cfg, [(2.0,), (5.0,)]),
    "apg": (apg, [(2.0, 0.1, 1.0), (5.0, 0.5, 0.7)]),
    "cfg_zero": (METHODS["cfg_zero"], [(2.0, 0.9), (5.0, 0.2)]),
    "cfg_pp": (cfg_pp, [(0.4,), (0.9,)]),
    "cfg_per_condition": (lambda _, scale: cfg_per_condition(model, {"label": scale}), [(2.0,), (5.0,)]),
    "autoguidance": (METHODS["autoguidance"], [(2.0,), (5.0,)]),
    "guidance_embedding": (lambda _, scale: guidance_embedding(distilled, scale), [(2.0,), (5.0,)]),
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


@pytest.mark.parametrize("function", [*METHODS.values(), guidance_embedding, rescale, interval, threshold])
def test_numbers_are_annotated_as_traced(function):
    """`Generator` traces the keywords whose annotation contains Array; only `percentile` is a static number."""
    for name, parameter in inspect.signature(function).parameters.items():
        if isinstance(parameter.default, float):
            assert (Array in typing.get_args(parameter.annotation)) == (name != "percentile"), name


@pytest.mark.parametrize("name", ["cfg", "apg", "cfg_per_condition"])
@pytest.mark.parametrize("mapping", [False, True])
def test_conditions_that_the_caller_drops_stay_dropped(name, mapping):
    def denoise(x, t, cond):
        keep = cond["keep"]["label"] if isinstance(cond["keep"], dict) else cond["keep"]
        return Denoised(0.3 * x + jnp.where(keep, cond["label"] + 1.0, 0)[:, None])

    options = {"scales": {"label": 3.0}} if name == "cfg_per_condition" else {"scale": 3.0}
    guided = getattr(guidances, name)(denoise, **options)
    keep, x = jnp.array([True, False]), jnp.ones((2, 2))
    cond = {"label": jnp.array([4.0, 4.0]), "keep": {"label": keep} if mapping else keep}
    x0 = guided(x, jnp.float32(0.5), cond).x0
    np.testing.assert_allclose(x0[1], 0.3, rtol=1e-6)
    assert (x0[0] > 1).all()
