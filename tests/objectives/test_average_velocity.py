"""Average-velocity objectives on Gaussian data, where the ODE and the average velocity have closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import derivative, expand
from diffusion.core.build import build
from diffusion.core.types import Denoised
from diffusion.objectives.base.average_velocity import max_step_examples, num_step_examples
from diffusion.process.analytic import Mixture
from diffusion.sampling.ode.first_order import first_order
from diffusion.training import ema, optimizer
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from tests.objectives.drawing import with_draws
from tests.process.gaussian_ode import gaussian_ode_map
from tests.refusals import refused
from tests.tiers import slow_except

MEAN, STD = 0.3, 0.6
DATA = Mixture([[MEAN, MEAN]], [STD], [1.0])
SCHEDULES = [{"name": "flow", "shift": 3.0}, "trig", "vp", "edm"]


def velocity(schedule, x, t):
    """Returns dx/dt of the ODE."""
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    deviation = (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
    x0, eps = MEAN + alpha * STD**2 * deviation, sigma * deviation
    return expand(derivative(schedule.alpha, t), x) * x0 + expand(derivative(schedule.sigma, t), x) * eps


def flow(schedule, x, t, r):
    """Returns the point at r to which the ODE maps x at t."""
    return gaussian_ode_map(x, MEAN, STD, schedule.alpha(t), schedule.sigma(t), schedule.alpha(r), schedule.sigma(r))


def exact(schedule):
    """Returns a network that gives the exact average velocity, with c_noise = "unit"."""

    def net(params, x, c_noise, cond, *, key=None):
        t, length = c_noise, cond["step_size"]
        x = x * expand(jnp.maximum(jnp.hypot(schedule.alpha(t), schedule.sigma(t)), 1), x)
        step = (x - flow(schedule, x, t, t - length)) / expand(jnp.where(length == 0, 1, length), x)
        return jnp.where(expand(length == 0, x), velocity(schedule, x, t), step)

    return net


def objective_of(**options):
    return build("objectives", {"name": "mean_flow", **options}, field="objective")


@pytest.fixture
def points():
    """Returns x `[8, 2]`, t `[8]` and r `[8]` below t."""
    pairs = [(0.2, 0.0), (0.3, 0.29), (0.5, 0.1), (0.5, 0.4), (0.9, 0.2), (1.0, 0.0), (1.0, 0.5), (1.0, 0.999)]
    t, r = jnp.array(pairs).T
    return jax.random.normal(jax.random.key(0), (8, 2), float), t, r


@pytest.mark.parametrize("schedule", slow_except(SCHEDULES[:1], SCHEDULES), ids=str)
def test_step_arrives_on_the_path(x64, points, schedule):
    objective, (x, t, r) = objective_of(schedule=schedule), points
    path = objective.schedule
    x = x * expand(path.sigma(t), x)

    @jax.jit
    def arrived(x, t, r):
        denoised = objective.denoiser(exact(path), {"net": None})(x, t, {"target_time": r})
        assert denoised.kind == "flow_map"
        return jax.vmap(lambda x, x0, t, r: first_order(path, x, Denoised(x0), t, r))(x, denoised.x0, t, r)

    np.testing.assert_allclose(arrived(x, t, r), flow(path, x, t, r), atol=1e-9)


@pytest.mark.parametrize("schedule", slow_except(SCHEDULES[:1], SCHEDULES), ids=str)
def test_without_target_time_it_is_the_posterior_mean(x64, points, schedule):
    """With a target time close to t it is nearly the posterior mean."""
    objective, (x, t, _) = objective_of(schedule=schedule), points
    path = objective.schedule
    x = x * expand(path.sigma(t), x)
    denoise = jax.jit(objective.denoiser(exact(path), {"net": None}))
    mean, same, near, far = (
        denoise(x, t, cond) for cond in ({}, {"target_time": t}, {"target_time": t - 1e-4}, {"target_time": t - 0.1})
    )
    assert mean.kind == "posterior_mean" and same.kind == "flow_map"
    expected = DATA.denoise(x, path.alpha(t), path.sigma(t))
    np.testing.assert_allclose(mean.x0, expected, atol=1e-9)
    np.testing.assert_array_equal(same.x0, mean.x0)
    np.testing.assert_allclose(near.x0, expected, atol=2e-2 if schedule == "vp" else 2e-3)
    assert jnp.abs(far.x0 - expected).max() > 5e-3
    scalar = denoise(x, t[-1], {})
    np.testing.assert_allclose(scalar.x0, DATA.denoise(x, path.alpha(t[-1]), path.sigma(t[-1])), atol=1e-9)


@pytest.mark.parametrize(("c_noise", "scale"), [("unit", 1), ("time", 1000)])
def test_step_size_has_the_scale_of_the_noise_label(points, c_noise, scale):
    x, t, r = points
    seen = {}

    def net(params, x, c_noise, cond, *, key=None):
        seen.update(cond, t=c_noise, x=x)
        return x

    objective = objective_of(schedule="edm", c_noise=c_noise)
    objective.denoiser(net, {"net": None})(x, t, {"target_time": r, "label": jnp.arange(8)})
    np.testing.assert_allclose(seen["t"], scale * t, rtol=1e-6)
    np.testing.assert_allclose(seen["step_size"], scale * (t - r), rtol=1e-4)
    np.testing.assert_allclose(seen["x"], x / jnp.sqrt(1 + (80 * t[:, None]) ** 2), rtol=1e-6)
    np.testing.assert_array_equal(seen["label"], np.arange(8))
    objective.denoiser(net, {"net": None})(x, t, {})
    assert (seen["step_size"] == 0).all()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.25, 0.29, 0.3, 1 / 3, 0.75, 1.0])
def test_max_step_examples_bounds_every_micro_batch(share):
    for n in range(1, 60):
        first = np.arange(n) < num_step_examples(share, n)
        for parts in (parts for parts in range(1, n + 1) if n % parts == 0):
            for part in range(parts):
                micro = first[part::parts]
                assert not micro[max_step_examples(share, n // parts) :].any()
        assert max_step_examples(share, n) <= share * n + 1


@pytest.mark.parametrize("name", ["mean_flow", "shortcut"])
@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"schedule": "vp_sde"}, "objective.schedule"),
        ({"schedule": "ve"}, "objective.schedule"),
        ({"schedule": "learned"}, "objective.schedule.name"),
        ({"c_noise": "log_sigma"}, "objective.c_noise"),
        ({"parameterization": "velocity"}, "objective.parameterization"),
        ({"guidance": -1.0}, "objective.guidance"),
    ],
)
def test_invalid_options_are_rejected(name, options, field):
    with refused(field):
        build("objectives", {"name": name, **options}, field="objective")


@pytest.mark.parametrize(("name", "guidance"), [("mean_flow", 2.0), ("mean_flow", (1.0, 2.0)), ("shortcut", 2.0)])
def test_guidance_requires_a_condition_to_drop(name, guidance):
    objective = build("objectives", {"name": name, "guidance": guidance})
    batch = with_draws(objective, {"x": jnp.ones((8, 2)), "cond": {"keep": jnp.ones(8, bool)}}, jax.random.key(0))
    params = {"net": None}
    with refused("objective.guidance"):
        jax.eval_shape(lambda: objective.loss(exact(objective.schedule), params, params, batch, jax.random.key(0), 0))


@pytest.mark.parametrize("name", ["mean_flow", "shortcut"])
def test_network_without_a_step_size_is_rejected(name):
    objective = build("objectives", name)
    network = build("networks", {"name": "mlp", "width": 8, "depth": 1}, shape=(2,))
    with refused("network.scalar_conditions"):
        objective.init(network, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean_flow", "shortcut"])
def test_accumulation_gives_the_same_training(name):
    """All random numbers are drawn for the whole batch, and each micro-batch has its share of the step examples."""
    objective = build("objectives", {"name": name, "time_sampler": "stratified"})
    network = build(
        "networks", {"name": "mlp", "width": 8, "depth": 1, "scalar_conditions": ("step_size",)}, shape=(2,)
    )
    opt, averages = optimizer.make_optimizer(steps=9, name="sgd", learning_rate=0.1), ema.make_ema(decays=(0.5,))
    batch = {"x": jax.random.normal(jax.random.key(0), (24, 2)), "cond": {}}
    start = jax.jit(lambda: init_state(objective, network, opt, averages, jax.random.key(0)))()
    states = []
    for accumulate in (1, 3):
        state = start
        step = jax.jit(make_step(objective, network, opt, averages, seed=0, accumulate=accumulate))
        for _ in range(2):
            state, metrics = step(state, batch)
        states.append((state.params, metrics["loss"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *states)
    moved = states[0][0]["net"]["linear_out"]["kernel"]
    assert jnp.abs(moved).max() > 1e-3
