"""Shortcut models, compared with closed forms for Gaussian data and for linear networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import expand
from diffusion.core.build import build
from tests.objectives.drawing import with_draws
from tests.objectives.test_average_velocity import exact, flow, velocity
from tests.refusals import refused
from tests.tiers import slow_except


def objective_of(**options):
    return build("objectives", {"name": "shortcut", **options}, field="objective")


@pytest.mark.parametrize("schedule", slow_except(("flow",), ("flow", "trig", "edm")))
def test_two_half_steps_equal_one_step(x64, schedule):
    """This holds for the exact average velocity. The halves of the shortest steps are Euler steps of the ODE."""
    objective = objective_of(schedule=schedule, base_steps=8)
    path, net = objective.schedule, exact(objective.schedule)
    t, r = jnp.array([1.0, 1.0, 0.5, 0.75, 0.25]), jnp.array([0.0, 0.5, 0.0, 0.5, 0.0])
    x = expand(path.sigma(t), t[:, None]) * jax.random.normal(jax.random.key(0), (5, 2), float)
    halves = jax.jit(lambda: objective.two_half_steps(net, None, x, t, r, {}))()
    length = (t - r)[:, None]
    np.testing.assert_allclose(halves[:3], ((x - flow(path, x, t, r)) / length)[:3], rtol=1e-9)
    first = velocity(path, x, t)
    second = velocity(path, x - length / 2 * first, t - 1 / 8)
    np.testing.assert_allclose(halves[3:], (first + second)[3:] / 2, rtol=1e-9)
    # Hence the loss of the steps is small, and that of the flow large, since its target is the velocity of one example.
    fine = objective_of(schedule=schedule, base_steps=1024, bootstrap=0.75)
    batch = {"x": jnp.zeros((64, 2)), "cond": {}}
    params = {"net": None}
    key = jax.random.key(0)
    metrics = jax.jit(lambda: fine.loss(net, params, params, with_draws(fine, batch, key), key, 0))()[1]
    assert float(metrics["step_loss"]) < 1e-3 * float(metrics["flow_loss"])


def linear(params, x, c_noise, cond, *, key=None):
    return params["w"] * (x * expand(c_noise, x) + expand(cond["step_size"], x) + 1)


def test_loss_and_gradient_match_a_manual_computation(x64):
    """The half steps use the averaged parameters, and neither they nor the target receive a gradient."""
    objective = objective_of(base_steps=4, bootstrap=0.75, time_sampler="uniform")
    x0, w, average = jax.random.normal(jax.random.key(0), (32, 2), float), 0.7, 0.4
    batch = {"x": x0, "cond": {}}
    draws = batch["draws"] = objective.draw(batch, jax.random.key(1), 0, {})

    def loss(params, ema):
        return objective.loss(linear, params, ema, batch, None, 0)

    t, r, eps = np.asarray(draws["t"])[:, None], np.asarray(draws["r"])[:, None], np.asarray(draws["eps"])
    assert (r[:24] < t[:24]).all() and (r[24:] == t[24:]).all() and 3 < (t - r == 0.5).sum() < 21
    x, half, target = (1 - t) * x0 + t * eps, (t - r) / 2, np.array(eps - x0)
    size = np.where(half > 0.25, half, 0)
    first = average * (x * t + size + 1)
    second = average * ((x - half * first) * (t - half) + size + 1)
    target[:24] = ((first + second) / 2)[:24]
    feature = x * t + (t - r) + 1
    error = ((w * feature - target) ** 2).mean(axis=1)
    params, ema = {"net": {"w": w}}, {"net": {"w": average}}
    found, metrics = jax.jit(loss)(params, ema)
    np.testing.assert_allclose(found, error, rtol=1e-12)
    np.testing.assert_allclose(
        [float(metrics["step_loss"]), float(metrics["flow_loss"])], [error[:24].mean(), error[24:].mean()]
    )
    own, of_average = jax.jit(jax.jacobian(lambda *p: loss(*p)[0], argnums=(0, 1)))(params, ema)
    np.testing.assert_allclose(own["net"]["w"], (2 * (w * feature - target) * feature).mean(axis=1), rtol=1e-12)
    assert (of_average["net"]["w"] == 0).all()


def test_steps_have_all_lengths_and_lie_on_their_lattice():
    objective = objective_of(base_steps=16, bootstrap=0.5, time_sampler="stratified")
    draws = jax.jit(objective.draw)({"x": jnp.zeros((16_000, 1))}, jax.random.key(0), 0, {})
    t, length = np.asarray(draws["t"]), np.asarray(draws["t"] - draws["r"])
    assert (length[8000:] == 0).all() and (draws["weight"] == 1).all()
    np.testing.assert_allclose(np.quantile(t[8000:], [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
    values, counts = np.unique(length[:8000], return_counts=True)
    np.testing.assert_array_equal(values, [1 / 8, 1 / 4, 1 / 2, 1])
    np.testing.assert_allclose(counts / 8000, 0.25, atol=0.03)
    for value in values:
        starts, counts = np.unique(t[:8000][length[:8000] == value], return_counts=True)
        np.testing.assert_array_equal(starts, np.arange(1, 1 / value + 1) * value)
        np.testing.assert_allclose(counts / counts.sum(), value, atol=0.05)


@pytest.mark.parametrize(("c_noise", "scale"), [("unit", 1), ("time", 1000)])
def test_step_size_of_the_shortest_steps_is_zero(c_noise, scale):
    objective, seen = objective_of(c_noise=c_noise, base_steps=8), {}

    def net(params, x, c_noise, cond, *, key=None):
        seen.update(cond)
        return x

    t = jnp.array([1.0, 1.0, 0.5, 0.125, 0.3])
    r = t - jnp.array([1.0, 0.25, 1 / 8, 1 / 8, 0.0])
    denoise = objective.denoiser(net, {"net": None})
    assert denoise(jnp.ones((5, 2)), t, {"target_time": r}).kind == "flow_map"
    np.testing.assert_allclose(seen["step_size"], scale * jnp.array([1, 0.25, 0, 0, 0]), rtol=1e-6)


def test_step_label_is_the_logarithm_of_the_number_of_steps():
    """As in the authors' code: 0 for one step, log2(base_steps) for the shortest ones and for flow matching."""
    objective, seen = objective_of(base_steps=8, step_label="log2", schedule="flow"), {}

    def net(params, x, c_noise, cond, *, key=None):
        seen.update(cond, c_noise=c_noise)
        return x

    t = jnp.array([1.0, 1.0, 0.5, 0.125, 0.3])
    r = t - jnp.array([1.0, 0.25, 1 / 8, 1 / 8, 0.0])
    denoise = objective.denoiser(net, {"net": None})
    x = jnp.arange(10.0).reshape(5, 2)
    denoised = denoise(x, t, {"target_time": r})
    np.testing.assert_allclose(seen["step_size"], [0, 2, 3, 3, 3], atol=1e-6)
    np.testing.assert_allclose(seen["c_noise"], t)
    length, noise = np.asarray(t - r)[:, None], np.asarray(t)[:, None]
    np.testing.assert_allclose(denoised.x0, x - noise * x, atol=1e-6)  # x - t u, with u = x
    batch = with_draws(objective, {"x": x, "cond": {}}, jax.random.key(0))
    assert np.isfinite(objective.loss(net, {"net": None}, {"net": None}, batch, None, 0)[0]).all() and length.any()


def test_guidance_applies_to_shortest_steps_with_a_condition(x64):
    objective = objective_of(base_steps=8, guidance=3.0)

    def net(params, x, c_noise, cond, *, key=None):
        return jnp.where(expand(cond["keep"], x), 5.0, 1.0) + 0 * x

    t, r = jnp.array([1.0, 1.0, 0.5, 0.5]), jnp.array([0.75, 0.75, 0.0, 0.0])
    cond = {"label": jnp.zeros(4, int), "keep": jnp.array([True, False, True, False])}
    halves = jax.jit(lambda: objective.two_half_steps(net, None, jnp.zeros((4, 1)), t, r, cond))()
    np.testing.assert_allclose(halves[:, 0], [1 + 3 * 4, 1, 5, 1])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"base_steps": 100}, "objective.base_steps"),
        ({"base_steps": 1}, "objective.base_steps"),
        ({"bootstrap": 1.0}, "objective.bootstrap"),
    ],
)
def test_invalid_options_are_rejected(options, field):
    with refused(field):
        objective_of(**options)
