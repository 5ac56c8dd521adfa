import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import derivative
from diffusion.core.build import build, names
from tests.refusals import refused

SCHEDULES = ["vp", {"name": "vp", "betas": "cosine"}, {"name": "vp", "zero_terminal_snr": True}, "vp_sde", "ve", "edm",
             "flow", {"name": "flow", "shift": 3.0}, "trig"]  # fmt: skip
NAMES = names("parameterization")


def at(schedule, t=None):
    """Returns a schedule, times inside (0, 1), and alpha and sigma at these times."""
    schedule = build("schedules", schedule)
    t = jnp.linspace(0.01, 0.97, 99) if t is None else t
    return schedule, t, schedule.alpha(t), schedule.sigma(t)


def pair():
    x0, eps = jax.random.normal(jax.random.key(0), (2, 99))
    return x0, eps


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", [*NAMES, {"name": "edm", "negative": True}], ids=str)
def test_target_and_x0_are_inverse(x64, name, schedule):
    """c_skip and c_out map the target back to x0, and equal the general expressions in a and b."""
    schedule, t, alpha, sigma = at(schedule)
    coeffs = build("parameterization", name)(schedule, t)
    x0, eps = pair()
    x_t = alpha * x0 + sigma * eps
    # The rounding error is relative to the two terms, which nearly cancel for large sigma / alpha.
    terms = abs(coeffs.c_skip * x_t) + abs(coeffs.c_out * coeffs.target(x0, eps)) + 1
    np.testing.assert_allclose((coeffs.to_x0(coeffs.target(x0, eps), x_t) - x0) / terms, 0, atol=1e-12)
    determinant = alpha * coeffs.b - sigma * coeffs.a
    np.testing.assert_allclose(coeffs.c_skip * determinant / coeffs.b, 1, atol=1e-12) if name != "x0" else None
    np.testing.assert_allclose(coeffs.c_out * determinant / sigma, -1, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_convert_between_all_parameterizations(x64, name, schedule):
    schedule, t, alpha, sigma = at(schedule)
    x0, eps = pair()
    x_t = alpha * x0 + sigma * eps
    first = build("parameterization", name)(schedule, t)
    for other in NAMES:
        second = build("parameterization", other)(schedule, t)
        converted = second.from_x0(first.to_x0(first.target(x0, eps), x_t), x_t, alpha, sigma)
        # The conversion multiplies an error by c_out of the first over c_out of the second.
        gain = 1 + abs(first.c_out / second.c_out) * (1 + abs(first.target(x0, eps))) + abs(second.b / sigma * x_t)
        np.testing.assert_allclose((converted - second.target(x0, eps)) / gain, 0, atol=1e-12)


def test_targets_match_the_papers(x64):
    schedule, t, alpha, sigma = at("trig", jnp.array([0.25, 0.7]))
    x0, eps = jnp.array([0.3, -0.2]), jnp.array([1.0, -2.0])
    expected = {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "velocity": derivative(lambda t: schedule.alpha(t) * x0 + schedule.sigma(t) * eps, t),
        "score": -eps / sigma,
    }
    for name, target in expected.items():
        np.testing.assert_allclose(build("parameterization", name)(schedule, t).target(x0, eps), target, rtol=1e-12)


@pytest.mark.parametrize("name", ["edm", "consistency"])
def test_edm_is_karras_table_1(x64, name):
    """On EDM's schedule, the four coefficients are the paper's, and input and target have unit variance."""
    data, low = 0.6, 0.05
    keywords = {"name": name, "sigma_data": data, **({"sigma_min": low} if name == "consistency" else {})}
    schedule, t, _, sigma = at("edm", jnp.array([0.01, 0.3, 1.0]))
    coeffs = build("parameterization", keywords)(schedule, t)
    above = sigma - low if name == "consistency" else sigma
    np.testing.assert_allclose(coeffs.c_skip, data**2 / (above**2 + data**2), rtol=1e-12)
    np.testing.assert_allclose(coeffs.c_out, above * data / np.sqrt(sigma**2 + data**2), rtol=1e-12)
    np.testing.assert_allclose(coeffs.c_in, 1 / np.sqrt(sigma**2 + data**2), rtol=1e-12)
    np.testing.assert_allclose(coeffs.c_noise, np.log(sigma) / 4, rtol=1e-12)
    if name == "edm":
        np.testing.assert_allclose(coeffs.a**2 * data**2 + coeffs.b**2, 1, rtol=1e-12)


def test_negative_edm_is_v_on_the_path_of_unit_variance(x64):
    """For sigma_data = 1, on every schedule: v = cos eps - sin x0 with tan = sigma / alpha."""
    x0, eps = pair()
    for name in ("edm", "vp", "flow"):
        schedule, t, alpha, sigma = at(name)
        angle = np.arctan2(sigma, alpha)
        coeffs = build("parameterization", {"name": "edm", "sigma_data": 1.0, "negative": True})(schedule, t)
        np.testing.assert_allclose(coeffs.target(x0, eps), np.cos(angle) * eps - np.sin(angle) * x0, atol=1e-12)
        v = build("parameterization", "v")(build("schedules", "vp"), build("schedules", "vp").time(schedule.log_snr(t)))
        np.testing.assert_allclose(coeffs.target(x0, eps), v.target(x0, eps), atol=1e-9)


def test_edm_does_not_depend_on_the_scale_of_the_path(x64):
    """At equal sigma / alpha, the network has the same input, target and noise label on every schedule."""
    log_snr = jnp.array([3.0, 0.0, -5.0])
    x0, eps = jnp.array([0.3, -0.2, 0.9]), jnp.array([1.0, -2.0, 0.1])
    seen = []
    for name in ("edm", "vp", "flow", "trig"):
        schedule = build("schedules", name)
        t = schedule.time(log_snr)
        coeffs = build("parameterization", "edm")(schedule, t)
        x_t = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
        seen.append(np.stack([coeffs.c_in * x_t, coeffs.target(x0, eps), coeffs.c_noise]))
    for other in seen[1:]:
        np.testing.assert_allclose(other, seen[0], rtol=1e-9, atol=1e-12)


def test_consistency_boundary_is_exact():
    """f(x, sigma_min) = x holds exactly, for every output of the network."""
    schedule = build("schedules", {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0})
    t = schedule.time(-2 * jnp.log(jnp.float32(0.002)))
    coeffs = build("parameterization", {"name": "consistency", "sigma_min": float(schedule.sigma(t))})(schedule, t)
    assert coeffs.c_skip == 1 and coeffs.c_out == 0


@pytest.mark.parametrize("name", ["eps", "x0", "v", "velocity", "edm"])
@pytest.mark.parametrize("schedule", ["vp", "flow", "trig", "edm", {"name": "vp", "zero_terminal_snr": True}], ids=str)
def test_data_end_is_exact(name, schedule):
    """At t = 0 every parameterization maps x_t to itself."""
    coeffs = build("parameterization", {"name": name, "c_noise": "time"})(build("schedules", schedule), jnp.zeros(()))
    assert np.isfinite([coeffs.c_skip, coeffs.c_out, coeffs.a, coeffs.b]).all()
    if name != "x0":  # its output is x0 itself
        np.testing.assert_allclose(coeffs.c_skip, 1, rtol=1e-6)
        assert coeffs.c_out == 0


@pytest.mark.parametrize("name", ["x0", "v", "velocity", "edm", "consistency"])
@pytest.mark.parametrize("schedule", ["flow", "trig", {"name": "vp", "zero_terminal_snr": True}], ids=str)
def test_noise_end_is_finite(name, schedule):
    """The parameterizations that are defined at zero SNR have finite coefficients there."""
    coeffs = build("parameterization", {"name": name, "c_noise": "time"})(build("schedules", schedule), jnp.ones(()))
    assert np.isfinite(list(vars(coeffs).values())).all()


def test_inputs_keep_unit_scale():
    """The inputs of variance exploding paths are scaled down; all others are unchanged."""
    for name in ("eps", "x0", "v", "velocity", "score"):
        for schedule in ("vp", "flow", "trig"):
            built, t, _, _ = at(schedule)
            np.testing.assert_allclose(build("parameterization", name)(built, t).c_in, 1, rtol=1e-6)
        built, t, _, sigma = at("ve")
        np.testing.assert_allclose(build("parameterization", name)(built, t).c_in, (1 + sigma**2) ** -0.5, rtol=1e-5)


def test_noise_label():
    schedule = build("schedules", {"name": "vp", "num_steps": 50})
    t = jnp.array([1 / 50, 1.0])
    np.testing.assert_allclose(build("parameterization", "eps")(schedule, t).c_noise, [20, 1000])
    index = build("parameterization", {"name": "eps", "c_noise": "index"})(schedule, t)
    np.testing.assert_allclose(index.c_noise, [0, 49], atol=1e-5)
    labels = [build("parameterization", {"name": "eps", "c_noise": name})(schedule, t).c_noise
              for name in ("log_sigma", "log_sigma_1000")]  # fmt: skip
    np.testing.assert_allclose(labels[1], 1000 * labels[0], rtol=1e-6)
    with refused("c_noise"):
        build("parameterization", {"name": "eps", "c_noise": "index"})(build("schedules", "flow"), t)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"name": "edm", "sigma_data": 0.0}, "sigma_data"),
        ({"name": "consistency", "sigma_data": -1.0}, "sigma_data"),
        ({"name": "consistency", "sigma_min": -0.1}, "sigma_min"),
        ({"name": "eps", "c_noise": "clock"}, "c_noise"),
    ],
)
def test_bad_options(spec, field):
    with refused(f"parameterization.{field}"):
        build("parameterization", spec)
