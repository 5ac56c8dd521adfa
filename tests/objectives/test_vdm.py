"""The variational bound with a learned schedule, compared with entropies."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.core.arrays import derivative
from diffusion.core.build import build
from diffusion.core.types import Network
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from tests.objectives.drawing import with_draws
from tests.refusals import refused

STD = 0.5


def optimal(schedule):
    """Returns a network of c_noise = gamma / 8 that predicts the eps of the optimal denoiser of data N(0, STD^2)."""

    def net(params, x, c_noise, cond, *, key=None):
        gamma = (8 * c_noise)[:, None]
        signal, noise = jax.nn.sigmoid(-gamma), jax.nn.sigmoid(gamma)
        return jnp.sqrt(noise) / (signal * STD**2 + noise) * x

    return net


@pytest.fixture
def vdm(x64):
    objective = build(
        "objectives",
        {
            "name": "vdm",
            "schedule": {"name": "learned", "gamma_min": -9.0, "gamma_max": 8.0},
            "parameterization": {"name": "eps", "c_noise": "log_sigma"},
        },
    )
    params = objective.init(Network(lambda key: {"unused": jnp.zeros(())}, None), jax.random.key(0))
    params["gamma"] = {**params["gamma"], "height": params["gamma"]["height"] + 4}
    return objective, params


def batch(n):
    return {"x": STD * jax.random.normal(jax.random.key(1), (n, 3)), "cond": {}}


@pytest.mark.slow
def test_bound_of_the_optimal_model_is_the_entropy(vdm):
    """In nats per dimension. The bound is tight for continuous time and a nearly complete path, for every gamma between
    the ends."""
    objective, params = vdm
    key = jax.random.key(2)
    measured = jax.jit(
        lambda batch: objective.loss(optimal(objective), params, {}, with_draws(objective, batch, key), key, 0)
    )
    loss, metrics = measured(batch(1_500_000))
    entropy = np.log(STD * np.sqrt(2 * np.pi * np.e))
    error = loss.std() / loss.size**0.5
    assert abs(loss.mean() - entropy) < 4 * error < 0.03
    np.testing.assert_allclose(metrics["bits_per_dim"], loss.mean() / np.log(2))
    terms = metrics["diffusion"] + metrics["prior"] + metrics["reconstruction"]
    np.testing.assert_allclose(terms, loss.mean())


def test_bound_of_a_worse_model_is_higher(vdm):
    objective, params = vdm
    good, key = optimal(objective), jax.random.key(2)
    drawn = with_draws(objective, batch(50_000), key)

    @jax.jit
    def bound(factor):
        return objective.loss(lambda *args, key=None: factor * good(*args, key=key), params, {}, drawn, key, 0)[
            0
        ].mean()

    assert bound(0.8) > bound(1.0) + 0.05


def test_gradient_of_gamma(vdm):
    """The ends receive the gradient of the bound, and the parameters between them that of its square."""
    objective, params = vdm
    example = batch(8)
    example["draws"] = objective.draw(example, jax.random.key(3), 0, {})

    @jax.jit
    def losses(gamma):
        return objective.loss(optimal(objective), {**params, "gamma": gamma}, {}, example, None, 0)[0]

    gradient = jax.jit(jax.grad(lambda gamma: jnp.sum(losses(gamma))))(params["gamma"])

    @jax.jit
    def diffusion(gamma):
        """Returns the diffusion term, computed explicitly."""
        schedule, draws = objective.schedule.at(gamma), example["draws"]
        t = draws["t"]
        x_t = schedule.alpha(t)[:, None] * example["x"] + schedule.sigma(t)[:, None] * draws["eps"]
        guess = optimal(objective)(None, x_t, -schedule.log_snr(t) / 8, {})
        return derivative(schedule.gamma, t) / 2 * jnp.mean((draws["eps"] - guess) ** 2, axis=1)

    def nudged(name, index, step, function):
        gamma = {**params["gamma"], name: params["gamma"][name].at[index].add(step)}
        return jnp.sum(function(gamma))

    for name, index, function in (("ends", 0, losses), ("ends", 1, losses)):
        slope = (nudged(name, index, 1e-5, function) - nudged(name, index, -1e-5, function)) / 2e-5
        np.testing.assert_allclose(gradient[name][index], slope, rtol=1e-4)
    for name, index in (("shift", 3), ("height", 7), ("scale", 11)):
        square = lambda gamma: diffusion(gamma) ** 2  # noqa: E731
        slope = (nudged(name, index, 1e-5, square) - nudged(name, index, -1e-5, square)) / 2e-5
        np.testing.assert_allclose(gradient[name][index], slope, rtol=1e-3, atol=1e-9)


def test_bound_of_discrete_data_reaches_its_entropy(x64):
    """For fair coins at -1 and 1 it is log 2 nats per dimension, with the optimal denoiser tanh."""
    spec = {
        "name": "vdm",
        "schedule": {"name": "learned", "gamma_min": -6.0, "gamma_max": 8.0},
        "parameterization": {"name": "x0", "c_noise": "log_sigma"},
        "levels": 2,
    }
    objective = build("objectives", spec)
    params = objective.init(Network(lambda key: {"unused": jnp.zeros(())}, None), jax.random.key(0))

    def net(params, x, c_noise, cond, *, key=None):
        gamma = (8 * c_noise)[:, None]
        return jnp.tanh(x * jnp.sqrt(jax.nn.sigmoid(-gamma)) / jax.nn.sigmoid(gamma))

    x = jax.random.rademacher(jax.random.key(0), (100_000, 2), jnp.float64)
    key = jax.random.key(1)
    batch = with_draws(objective, {"x": x, "cond": {}}, key)
    loss = jax.jit(lambda batch: objective.loss(net, params, {}, batch, key, 0)[0])(batch)
    assert abs(loss.mean() - np.log(2)) < 4 * loss.std() / loss.size**0.5 + 2e-4


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"schedule": "vp"}, "objectives.schedule.name"),
        ({"parameterization": "velocity"}, "objectives.parameterization.name"),
        ({"levels": 1}, "objectives.levels"),
        ({"schedule": {"name": "learned", "hidden": 0}}, "objectives.schedule.hidden"),
    ],
)
def test_invalid_options_are_rejected(spec, field):
    with refused(field):
        build("objectives", {"name": "vdm", **spec})


def test_importance_sampling_learns_the_law_of_the_term():
    """The state of a training holds the losses at t without their importance weights, the prior and the reconstruction,
    so that the law settles."""
    objective = build("objectives", {
        "name": "vdm", "time_sampler": {"name": "importance", "bins": 10, "history": 50},
        "schedule": {"name": "learned", "gamma_min": -5.0, "gamma_max": 5.0},
        "parameterization": {"name": "eps", "c_noise": "unit"},
    })  # fmt: skip

    def net(params, x, c_noise, cond, *, key=None):
        """Its error, and so the term for a straight gamma, is proportional to 1 + 9 t^2."""
        return 0 * params["unused"] * x + 3 * c_noise[:, None]

    network, still = Network(lambda key: {"unused": jnp.zeros(())}, net), make_optimizer(steps=1, name="sgd", clip=None)
    still = dataclasses.replace(still, transform=optax.set_to_zero())
    step = jax.jit(make_step(objective, network, still, make_ema(), seed=0))
    state = init_state(objective, network, still, make_ema(), jax.random.key(0))
    batch = {"x": jnp.full((256, 200), 100.0), "cond": {}}  # with a large prior
    for _ in range(40):
        state, metrics = step(state, batch)
    assert metrics["prior"] > metrics["diffusion"]
    t = (np.arange(1000) + 0.5) / 1000
    term = (10 / 2 * (1 + 9 * t**2)).reshape(10, 100)
    np.testing.assert_allclose(state.objective_state["losses"].mean(axis=1), term.mean(axis=1), rtol=0.07)
    law = np.sqrt((term**2).mean(axis=1))
    found = objective.time_sampler.probabilities(state.objective_state)
    assert np.abs(found - law / law.sum()).sum() / 2 < 0.02
