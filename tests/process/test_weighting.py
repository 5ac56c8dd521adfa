import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build, names
from tests.refusals import refused

# The papers' weights, on the squared error of x0.
ON_X0 = {
    "snr": lambda snr: snr,
    "truncated_snr": lambda snr: np.maximum(snr, 1),
    "min_snr": lambda snr: np.minimum(snr, 5),
    "soft_min_snr": lambda snr: 4 * snr / (4 + snr),
    "p2": lambda snr: snr / (1 + snr),
    "edm": lambda snr: snr + 1 / 0.5**2,
}
SCHEDULES = ["vp", "flow", "trig", "edm"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("parameterization", names("parameterization"))
@pytest.mark.parametrize("name", ON_X0)
def test_weight_on_x0_matches_the_paper_for_every_parameterization(x64, name, parameterization, schedule):
    """The weighted loss of F equals the paper's weight times the squared error of x0, for any error."""
    schedule = build("schedules", schedule)
    t = jnp.linspace(0.02, 0.95, 40)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    coefficients = build("parameterization", parameterization)(schedule, t)
    x0, eps, error = jax.random.normal(jax.random.key(0), (3, 40))
    x_t, target = alpha * x0 + sigma * eps, coefficients.target(x0, eps)
    output = target + error
    loss = build("weighting", name)(schedule, coefficients, t) * (output - target) ** 2
    snr = (alpha / sigma) ** 2
    expected = ON_X0[name](snr) * (coefficients.to_x0(output, x_t) - coefficients.to_x0(target, x_t)) ** 2
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_simple_is_one_on_the_output():
    schedule, t = build("schedules", "vp"), jnp.linspace(0.1, 1, 5)
    for name in names("parameterization"):
        coefficients = build("parameterization", name)(schedule, t)
        np.testing.assert_array_equal(build("weighting", "simple")(schedule, coefficients, t), 1)


def test_known_forms_on_eps_and_v(x64):
    """Hang et al. 2023: min(SNR, gamma) / SNR on eps, and / (SNR + 1) on v. EDM: 1 on the F of its parameterization."""
    schedule, t = build("schedules", "vp"), jnp.linspace(0.05, 1, 20)
    snr = (schedule.alpha(t) / schedule.sigma(t)) ** 2
    for name, expected in (("eps", np.minimum(snr, 5) / snr), ("v", np.minimum(snr, 5) / (snr + 1))):
        coefficients = build("parameterization", name)(schedule, t)
        np.testing.assert_allclose(build("weighting", "min_snr")(schedule, coefficients, t), expected, rtol=1e-9)
    coefficients = build("parameterization", "edm")(schedule, t)
    np.testing.assert_allclose(build("weighting", "edm")(schedule, coefficients, t), 1, rtol=1e-9)


@pytest.mark.parametrize("schedule", ["vp_sde", "flow", "trig", "edm"])
def test_vlb_is_the_derivative_of_snr(x64, schedule):
    """vlb is -SNR'(t) / 2 on x0, so its integral over t is half the change in SNR; sigmoid is a fraction of it."""
    schedule = build("schedules", schedule)
    t = jnp.linspace(0.2, 0.9, 4001)
    coefficients = build("parameterization", "x0")(schedule, t)
    weight = build("weighting", "vlb")(schedule, coefficients, t)
    snr = jnp.exp(schedule.log_snr(t))
    np.testing.assert_allclose(jnp.trapezoid(weight, t), (snr[0] - snr[-1]) / 2, rtol=1e-5)
    share = build("weighting", {"name": "sigmoid", "bias": 1.5})(schedule, coefficients, t) / weight
    np.testing.assert_allclose(share, 1 / (1 + snr * np.exp(-1.5)), rtol=1e-9)


ENDS = [
    {"name": "vp"},
    {"name": "vp", "betas": "scaled_linear", "zero_terminal_snr": True},
    {"name": "vp_sde"},
    {"name": "flow", "shift": 3.0},
    {"name": "trig", "sigma_data": 0.5},
    {"name": "edm"},
    {"name": "ve"},
]


@pytest.mark.parametrize("schedule", ENDS, ids=lambda spec: "-".join(map(str, spec.values())))
def test_weights_at_both_ends_are_their_limits(schedule):
    """Also where SNR is 0 or infinite, so that no product of 0 and infinity appears; neither in derivatives."""
    schedule = build("schedules", schedule)
    for name in names("weighting"):
        for parameterization in ("v", "x0"):
            coefficients, weighting = build("parameterization", parameterization), build("weighting", name)
            weight = lambda t, c=coefficients, w=weighting: w(schedule, c(schedule, t), t)  # noqa: E731
            value, slope = jax.jvp(weight, (jnp.array([0.0, 1.0, 1e-7, 1 - 1e-6]),), (jnp.ones(4),))
            assert np.isfinite(value).all() and (value >= 0).all(), (name, parameterization, value)
            np.testing.assert_allclose(value[1], value[3], rtol=1e-3, atol=1e-4, err_msg=name)
            assert np.isfinite(slope[1]), (name, parameterization, slope)


def test_weights_at_the_ends_in_closed_form():
    """For a velocity on the straight path, vlb is (1 - t) / t and sigmoid that times a share."""
    schedule, ends = build("schedules", "flow"), jnp.array([0.0, 1.0])

    def weights(name, parameterization):
        coefficients = build("parameterization", parameterization)(schedule, ends)
        return build("weighting", name)(schedule, coefficients, ends)

    np.testing.assert_allclose(weights("sigmoid", "velocity"), [0, 0], atol=1e-6)
    assert weights("vlb", "velocity")[0] > 1e6
    np.testing.assert_array_equal(weights("vlb", "velocity")[1], 0)
    np.testing.assert_allclose(weights("snr", "v"), [1, 0], atol=1e-6)
    np.testing.assert_allclose(weights("min_snr", "x0"), [5, 0], rtol=1e-6)
    np.testing.assert_allclose(weights("truncated_snr", "velocity"), [1, 1], rtol=1e-6)
    np.testing.assert_allclose(weights("edm", "x0")[1], 4, rtol=1e-6)


@pytest.mark.parametrize("name", ["vlb", "sigmoid"])
def test_loss_at_pure_noise_is_finite(name):
    """A discrete time sampler draws t = 1, where the gradient is 0 times that of the error."""
    spec = {"name": "denoising", "schedule": ENDS[1], "parameterization": "v", "time_sampler": "discrete"}
    objective = build("objectives", {**spec, "weighting": name})
    t, x = jnp.array([0.5, 1.0]), jax.random.normal(jax.random.key(0), (2, 3))
    batch = {"x": x, "cond": {}, "draws": {"t": t, "weight": jnp.ones(2), "eps": x[::-1]}}

    def loss(scale):
        net = lambda params, x, c_noise, cond, *, key=None: params * x  # noqa: E731
        return objective.loss(net, {"net": scale}, {}, batch, None, 0)[0]

    assert np.isfinite(jax.jacobian(loss)(1.0)).all()
    np.testing.assert_array_equal(loss(1.0)[1], 0)


def test_every_weighting_is_tested():
    assert set(names("weighting")) == {*ON_X0, "simple", "vlb", "sigmoid"}


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"name": "min_snr", "gamma": 0.0}, "gamma"),
        ({"name": "soft_min_snr", "gamma": -1.0}, "gamma"),
        ({"name": "p2", "k": 0.0}, "k"),
        ({"name": "edm", "sigma_data": 0.0}, "sigma_data"),
    ],
)
def test_bad_options(spec, field):
    with refused(f"weighting.{field}"):
        build("weighting", spec)
