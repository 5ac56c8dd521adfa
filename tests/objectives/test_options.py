"""Options of training that several objectives share. Each is off by default."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from diffusion.core.build import build
from diffusion.core.types import Network
from diffusion.objectives.base import noise, uncertainty
from diffusion.process.parameterization import Coefficients
from tests.objectives.drawing import with_draws
from tests.refusals import refused

OPTIONS = {"offset_noise": 0.3, "pyramid_noise": 0.6, "input_perturbation": 0.2}
OBJECTIVES = ("denoising", "flow_matching")


@pytest.fixture
def images(x64):
    return {"x": jax.random.normal(jax.random.key(0), (6, 4, 4, 2)), "cond": {}}


def zero(params, x, c_noise, cond, *, key=None):
    return jnp.zeros_like(x)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_options_add_to_what_is_drawn_without_them(images, name):
    """Times and noise are those of the objective without options, bit for bit."""
    plain = with_draws(build("objectives", name), images, jax.random.key(1))["draws"]
    for option, value in OPTIONS.items():
        draws = with_draws(build("objectives", {"name": name, option: value}), images, jax.random.key(1))["draws"]
        np.testing.assert_array_equal(draws["t"], plain["t"])
        if option == "input_perturbation":
            np.testing.assert_array_equal(draws["eps"], plain["eps"])
            assert abs(draws["perturbation"].std() / value - 1) < 0.15
        elif option == "offset_noise":
            shift = draws["eps"] - plain["eps"]
            np.testing.assert_allclose(shift, jnp.broadcast_to(shift[:, :1, :1], shift.shape), atol=1e-12)
            assert len(np.unique(np.round(shift, 9))) == 12  # one for each of 6 examples and 2 channels
        else:
            assert (draws["eps"] != plain["eps"]).all()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_input_perturbation_is_in_the_input_and_not_in_the_target(images, name):
    """The network sees alpha x0 + sigma (eps + gamma xi), and its target is that of eps (2301.11706, algorithm 1)."""
    objective = build("objectives", {"name": name, "input_perturbation": 0.2})
    batch = with_draws(objective, images, jax.random.key(1))
    draws, seen = batch["draws"], {}

    def net(params, x, c_noise, cond, *, key=None):
        seen["x"] = x
        return jnp.zeros_like(x)

    loss, _ = objective.loss(net, {"net": None}, {}, batch, None, 0)
    alpha, sigma = (c(draws["t"])[:, None, None, None] for c in (objective.schedule.alpha, objective.schedule.sigma))
    expected = alpha * images["x"] + sigma * (draws["eps"] + draws["perturbation"])
    np.testing.assert_allclose(seen["x"], expected, rtol=1e-12)
    target = draws["eps"] if name == "denoising" else draws["eps"] - images["x"]
    np.testing.assert_allclose(loss, (target**2).mean((1, 2, 3)), rtol=1e-12)


def covariance(samples):
    samples = np.asarray(samples).reshape(len(samples), -1)
    return samples.T @ samples / len(samples)


def test_covariance_of_offset_noise(x64):
    """It is I + s^2 1 1^T within a channel, and 0 between channels."""
    eps = jax.random.normal(jax.random.key(0), (100_000, 2, 3, 2))
    found = covariance(noise.offset(eps, jax.random.key(1), 0.7))
    np.testing.assert_allclose(found, np.eye(12) + 0.49 * np.kron(np.ones((6, 6)), np.eye(2)), atol=0.025)


def test_covariance_of_pyramid_noise(x64):
    """Pixels that share a block of side 2^l share the variance discount^2l; the whole variance is 1."""
    eps = jax.random.normal(jax.random.key(0), (100_000, 3, 5, 1))
    found = covariance(noise.pyramid(eps, jax.random.key(1), 0.8))
    rows, columns = np.divmod(np.arange(15), 5)
    expected = sum(
        0.64**level * np.equal.outer(rows >> level, rows >> level) * np.equal.outer(columns >> level, columns >> level)
        for level in range(4)
    )
    np.testing.assert_allclose(found, expected / expected[0, 0], atol=0.025)


@pytest.mark.parametrize("option", ["offset_noise", "pyramid_noise"])
def test_correlated_noise_is_for_pixels(option):
    objective = build("objectives", {"name": "denoising", option: 0.1})
    draws = with_draws(objective, {"x": jnp.zeros((2, 3, 4, 4, 1)), "cond": {}}, jax.random.key(0))["draws"]
    assert draws["eps"].shape == (2, 3, 4, 4, 1)  # a video
    with refused(f"objective.{option}"):
        with_draws(objective, {"x": jnp.zeros((2, 8)), "cond": {}}, jax.random.key(0))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_best_learned_weight(x64, name):
    """The best u is the log of the mean error at each time. With u = 0 the loss is that without a learned weight."""
    plain, objective = (build("objectives", {"name": name, "learned_weight": learned}) for learned in (False, True))
    network = Network(lambda key: {}, zero)
    assert set(objective.init(network, None)) == {"net", "weight"} and set(plain.init(network, None)) == {"net"}
    times, each = jnp.array([0.02, 0.3, 0.6, 1.0]), 50
    x0, eps = jax.random.normal(jax.random.key(1), (2, 4 * each, 3)) * jnp.array([0.1, 1, 3, 9]).repeat(each)[:, None]
    draws = {"t": times.repeat(each), "weight": jnp.ones(4 * each), "eps": eps}
    batch = {"x": x0, "cond": {}, "draws": draws}

    def losses(objective, kernel):
        weight = {"kernel": jnp.asarray(kernel)}
        return objective.loss(zero, {"net": {}, "weight": weight}, {}, batch, None, 0)[0]

    start = np.zeros(128)
    errors = losses(plain, start)
    np.testing.assert_array_equal(losses(objective, start), errors)
    value = jax.jit(jax.value_and_grad(lambda kernel: losses(objective, kernel).mean()))
    best = scipy.optimize.minimize(lambda kernel: tuple(map(np.asarray, value(kernel))), start, jac=True, tol=1e-10)
    u = losses(objective, best.x) - jnp.exp(-log_error(objective, best.x, draws["t"])) * errors
    np.testing.assert_allclose(u, log_error(objective, best.x, draws["t"]), atol=1e-9)
    np.testing.assert_allclose(u.reshape(4, each)[:, 0], jnp.log(errors.reshape(4, each).mean(1)), atol=1e-4)


def log_error(objective, kernel, t):
    return uncertainty.log_error({"kernel": jnp.asarray(kernel)}, objective.schedule, t)


def test_learned_weight_is_per_frame(x64):
    """With a time per frame, each frame has its own u."""
    objective = build("objectives", {"name": "flow_matching", "learned_weight": True})
    t = jnp.array([[0.1, 0.5, 1.0]])
    batch = {"x": jnp.ones((1, 3, 2, 2, 1)), "cond": {}}
    batch["draws"] = {"t": t, "weight": jnp.ones(1), "eps": jnp.zeros((1, 3, 2, 2, 1))}
    weight = {"kernel": jax.random.normal(jax.random.key(0), (128,)) / 9}
    loss = objective.weighted_error(jnp.zeros((1, 3, 2, 2, 1)), batch, _unit(t), {"weight": weight})
    u = log_error(objective, weight["kernel"], t)
    np.testing.assert_allclose(loss, (jnp.exp(-u) + u).mean(), rtol=1e-12)


def _unit(t):
    one, none = jnp.ones_like(t), jnp.zeros_like(t)
    return Coefficients(c_skip=none, c_out=one, c_in=one, c_noise=t, a=one, b=none)
