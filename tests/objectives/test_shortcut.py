import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.test_flow_map import exact, flow, velocity

from diffusion.core.arrays import expand
from diffusion.core.build import build
from diffusion.core.types import InputError


def objective_of(**options):
    return build("objectives", {"name": "shortcut", **options}, field="objective")


@pytest.mark.parametrize("schedule", ["flow", "trig", "edm"])
def test_two_half_steps_are_one(x64, schedule):
    """Of the exact average velocity; those of the shortest steps are Euler's of the ODE."""
    objective = objective_of(schedule=schedule, base_steps=8)
    path, net = objective.schedule, exact(objective.schedule)
    t, r = jnp.array([1.0, 1.0, 0.5, 0.75, 0.25]), jnp.array([0.0, 0.5, 0.0, 0.5, 0.0])
    x = expand(path.sigma(t), t[:, None]) * jax.random.normal(jax.random.key(0), (5, 2), float)
    halves = jax.jit(lambda: objective.of_two_halves(net, None, x, t, r, {}))()
    length = (t - r)[:, None]
    np.testing.assert_allclose(halves[:3], ((x - flow(path, x, t, r)) / length)[:3], rtol=1e-9)
    first = velocity(path, x, t)
    second = velocity(path, x - length / 2 * first, t - 1 / 8)
    np.testing.assert_allclose(halves[3:], (first + second)[3:] / 2, rtol=1e-9)
    # So the loss makes nothing of steps, and much of the flow, whose target is the velocity of one path of many.
    fine, batch = (
        objective_of(schedule=schedule, base_steps=1024, bootstrap=0.75),
        {"x": jnp.zeros((64, 2)), "cond": {}},
    )
    params = {"net": None}
    metrics = jax.jit(lambda: fine.loss(net, params, params, batch, jax.random.key(0), 0))()[1]
    assert metrics["step_loss"] < 1e-3 * metrics["flow_loss"]


def linear(params, x, c_noise, cond, *, key=None):
    return params["w"] * (x * expand(c_noise, x) + expand(cond["step_size"], x) + 1)


def test_loss_and_gradient_by_hand(x64):
    """The halves are those of the averaged parameters, and no gradient goes there or through the target."""
    objective = objective_of(base_steps=4, bootstrap=0.75, time_sampler="uniform")
    x0, w, average = jax.random.normal(jax.random.key(0), (32, 2), float), 0.7, 0.4
    batch = {"x": x0, "cond": {}}
    noise = batch["draws"] = objective.draw(batch, jax.random.key(1), 0, {})

    def loss(params, ema):
        return objective.loss(linear, params, ema, batch, None, 0)

    t, r, eps = np.asarray(noise["t"])[:, None], np.asarray(noise["r"])[:, None], np.asarray(noise["eps"])
    assert (r[:24] < t[:24]).all() and (r[24:] == t[24:]).all() and 3 < (t - r == 0.5).sum() < 21
    x, half, target = (1 - t) * x0 + t * eps, (t - r) / 2, np.array(eps - x0)
    told = np.where(half > 0.25, half, 0)
    first = average * (x * t + told + 1)
    second = average * ((x - half * first) * (t - half) + told + 1)
    target[:24] = ((first + second) / 2)[:24]
    feature = x * t + (t - r) + 1
    error = ((w * feature - target) ** 2).mean(axis=1)
    params, ema = {"net": {"w": w}}, {"net": {"w": average}}
    found, metrics = jax.jit(loss)(params, ema)
    np.testing.assert_allclose(found, error, rtol=1e-12)
    np.testing.assert_allclose([metrics["step_loss"], metrics["flow_loss"]], [error[:24].mean(), error[24:].mean()])
    own, of_average = jax.jit(jax.jacobian(lambda *p: loss(*p)[0], argnums=(0, 1)))(params, ema)
    np.testing.assert_allclose(own["net"]["w"], (2 * (w * feature - target) * feature).mean(axis=1), rtol=1e-12)
    assert (of_average["net"]["w"] == 0).all()


def test_steps_are_of_all_lengths_and_lie_on_their_lattice():
    objective = objective_of(base_steps=16, bootstrap=0.5, time_sampler="stratified")
    noise = jax.jit(objective.draw)({"x": jnp.zeros((16_000, 1))}, jax.random.key(0), 0, {})
    t, length = np.asarray(noise["t"]), np.asarray(noise["t"] - noise["r"])
    assert (length[8000:] == 0).all() and (noise["weight"] == 1).all()
    np.testing.assert_allclose(np.quantile(t[8000:], [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.02)
    values, counts = np.unique(length[:8000], return_counts=True)
    np.testing.assert_array_equal(values, [1 / 8, 1 / 4, 1 / 2, 1])
    np.testing.assert_allclose(counts / 8000, 0.25, atol=0.03)
    for value in values:
        starts, counts = np.unique(t[:8000][length[:8000] == value], return_counts=True)
        np.testing.assert_array_equal(starts, np.arange(1, 1 / value + 1) * value)
        np.testing.assert_allclose(counts / counts.sum(), value, atol=0.05)


@pytest.mark.parametrize(("c_noise", "scale"), [("unit", 1), ("time", 1000)])
def test_network_is_told_of_the_shortest_steps_as_of_none(c_noise, scale):
    objective, told = objective_of(c_noise=c_noise, base_steps=8), {}

    def net(params, x, c_noise, cond, *, key=None):
        told.update(cond)
        return x

    t = jnp.array([1.0, 1.0, 0.5, 0.125, 0.3])
    r = t - jnp.array([1.0, 0.25, 1 / 8, 1 / 8, 0.0])
    denoise = objective.denoiser(net, {"net": None})
    assert denoise(jnp.ones((5, 2)), t, {"target_time": r}).kind == "flow_map"
    np.testing.assert_allclose(told["step_size"], scale * jnp.array([1, 0.25, 0, 0, 0]), rtol=1e-6)


def test_guidance_is_of_the_shortest_steps_and_of_kept_conditions(x64):
    objective = objective_of(base_steps=8, guidance=3.0)

    def net(params, x, c_noise, cond, *, key=None):
        return jnp.where(expand(cond["keep"], x), 5.0, 1.0) + 0 * x

    t, r = jnp.array([1.0, 1.0, 0.5, 0.5]), jnp.array([0.75, 0.75, 0.0, 0.0])
    cond = {"label": jnp.zeros(4, int), "keep": jnp.array([True, False, True, False])}
    halves = jax.jit(lambda: objective.of_two_halves(net, None, jnp.zeros((4, 1)), t, r, cond))()
    np.testing.assert_allclose(halves[:, 0], [1 + 3 * 4, 1, 5, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_steps": 100}, r"base_steps: must be a power of two of at least 2, got 100"),
        ({"base_steps": 1}, r"base_steps: must be a power of two"),
        ({"bootstrap": 1.0}, r"bootstrap: must be in \[0, 1\)"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InputError, match=r"^objective\." + message):
        objective_of(**options)
