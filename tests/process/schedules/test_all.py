"""Properties of every schedule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffusion.core.arrays import derivative
from diffusion.core.build import build, names
from tests.refusals import refused
from tests.tiers import first_of_each, slow_except

VARIANTS = [
    *({"name": "vp", "betas": betas, "num_steps": 40} for betas in ("linear", "scaled_linear", "cosine", "sigmoid")),
    {"name": "vp", "zero_terminal_snr": True},
    {"name": "vp", "betas": "scaled_linear", "zero_terminal_snr": True, "num_steps": 2},
    {"name": "vp", "trained_betas": (0.01, 0.3, 0.2, 0.6), "num_steps": 4},
    {"name": "vp", "trained_betas": (0.1, 0.1, 1.0), "num_steps": 3},
    {"name": "laplace"},
    {"name": "laplace", "mean": 1.0, "scale": 1.5, "num_steps": 7},
    {"name": "shifted", "schedule": {"name": "trig", "sigma_data": 0.7}, "shift": 49.0},
    {"name": "shifted", "schedule": {"name": "vp", "num_steps": 40}, "shift": 0.3},
    {"name": "shifted", "schedule": "flow", "shift": 3.0},
    {"name": "shifted", "schedule": "edm", "shift": 2.0},
    {"name": "shifted", "schedule": "vp_sde", "shift": 2.0},
    {"name": "vp_sde"},
    {"name": "vp_sde", "beta_min": 2.0, "beta_max": 2.0},
    {"name": "ve"},
    {"name": "edm"},
    {"name": "flow"},
    {"name": "flow", "shift": 3.0},
    {"name": "trig"},
    {"name": "trig", "sigma_data": 0.7},
    {"name": "learned"},
]
INFINITE_AT_DATA = ("VPSDE", "VE")  # schedules whose derivative of sigma is infinite at t = 0


@pytest.fixture(
    params=slow_except(first_of_each(lambda spec: spec["name"], VARIANTS), VARIANTS),
    ids=lambda spec: "-".join(map(str, spec.values())),
)
def schedule(request, x64):
    built = build("schedules", request.param)
    if request.param["name"] == "learned":
        params = built.init(jax.random.key(0))
        return built.at({**params, "height": params["height"] + 9})  # far from the straight line
    return built


def base_of(schedule):
    return getattr(schedule, "base", schedule)


def test_every_schedule_is_tested():
    assert {spec["name"] for spec in VARIANTS} == set(names("schedules"))


def test_ends(schedule):
    """x_t is exactly data at t = 0 and, if the path ends in pure noise, exactly noise at t = 1, also in float32."""
    learned = hasattr(schedule, "at")
    for dtype in (jnp.float64, jnp.float32):
        zero, one = jnp.zeros((), dtype), jnp.ones((), dtype)
        if not learned:
            assert schedule.alpha(zero) == 1 and schedule.sigma(zero) == 0 and schedule.log_snr(zero) == jnp.inf
        assert np.isfinite([schedule.alpha(one), schedule.sigma(one)]).all()
        pure = schedule.alpha(jnp.float64(1)) < 1e-12
        if pure:
            noise = dtype(getattr(base_of(schedule), "sigma_data", 1))
            assert schedule.alpha(one) == 0 and schedule.sigma(one) == noise and schedule.log_snr(one) == -jnp.inf


def test_log_snr_and_its_inverse(schedule):
    t = jnp.linspace(1e-3, 1 - 1e-3, 777)
    log_snr = schedule.log_snr(t)
    np.testing.assert_allclose(log_snr, 2 * jnp.log(schedule.alpha(t) / schedule.sigma(t)), atol=1e-9)
    assert np.all(np.diff(log_snr) < 0)
    np.testing.assert_allclose(schedule.time(log_snr), t, atol=1e-11)


def test_time_of_infinite_log_snr(schedule):
    if not hasattr(schedule, "at"):
        assert schedule.time(jnp.float64(jnp.inf)) == 0
    if schedule.alpha(jnp.float64(1)) == 0:
        assert schedule.time(jnp.float64(-jnp.inf)) == 1


def test_derivatives(schedule):
    """Derivatives match central differences between a table's points and are finite at both ends."""
    t = jnp.linspace(0.0513, 0.9481, 37)
    for coefficient in (schedule.alpha, schedule.sigma):
        step = 1e-6
        difference = (coefficient(t + step) - coefficient(t - step)) / (2 * step)
        np.testing.assert_allclose(derivative(coefficient, t), difference, rtol=1e-6, atol=1e-6)
        ends = derivative(coefficient, jnp.array([0.0, 1.0]))
        skip_first = type(base_of(schedule)).__name__ in INFINITE_AT_DATA
        assert np.isfinite(ends[1 if skip_first else 0 :]).all()


def test_variance_is_preserved(schedule):
    if type(schedule).__name__ in ("VP", "VPSDE", "Trig", "Learned"):
        t, unit = jnp.linspace(0, 1, 99), getattr(schedule, "sigma_data", 1)
        np.testing.assert_allclose(schedule.alpha(t) ** 2 + (schedule.sigma(t) / unit) ** 2, 1, rtol=1e-12)


def test_formulas(x64):
    """Each schedule matches its paper's formula at one time."""
    t = jnp.float64(0.3)

    def values(spec):
        schedule = build("schedules", spec)
        return float(schedule.alpha(t)), float(schedule.sigma(t))

    integral = 0.1 * 0.3 + (20 - 0.1) * 0.3**2 / 2
    np.testing.assert_allclose(values("vp_sde"), (np.exp(-integral / 2), np.sqrt(1 - np.exp(-integral))), rtol=1e-12)
    ve = values({"name": "ve", "sigma_min": 0.1, "sigma_max": 10.0})
    np.testing.assert_allclose(ve, (1, 0.1 * np.sqrt(100**0.6 - 1)), rtol=1e-12)
    np.testing.assert_allclose(values("edm"), (1, 24), rtol=1e-12)
    np.testing.assert_allclose(values({"name": "flow", "shift": 3.0}), (1 - 0.9 / 1.6, 0.9 / 1.6), rtol=1e-12)
    np.testing.assert_allclose(values("trig"), (np.cos(0.15 * np.pi), np.sin(0.15 * np.pi)), rtol=1e-12)
    wide = values({"name": "trig", "sigma_data": 0.7})
    np.testing.assert_allclose(wide, (np.cos(0.15 * np.pi), 0.7 * np.sin(0.15 * np.pi)), rtol=1e-12)


@pytest.mark.parametrize("base", ["trig", "flow", "edm", "vp", "vp_sde"])
def test_shifted_is_the_path_at_another_noise_level(x64, base):
    """sigma / alpha is `shift` times as large, and x_t has the scale that it has on this kind of path."""
    plain, same, shifted = (
        build("schedules", base),
        *(build("schedules", {"name": "shifted", "schedule": base, "shift": shift}) for shift in (1.0, 3.0)),
    )
    t = jnp.linspace(0, 1, 41)[1:-1]
    for name in ("alpha", "sigma", "log_snr"):
        np.testing.assert_array_equal(getattr(same, name)(t), getattr(plain, name)(t))
    alpha, sigma = shifted.alpha(t), shifted.sigma(t)
    np.testing.assert_allclose(sigma / alpha, 3 * plain.sigma(t) / plain.alpha(t), rtol=1e-12)
    size = {"flow": alpha + sigma, "edm": alpha}.get(base, jnp.hypot(alpha, sigma))
    np.testing.assert_allclose(size, 1, rtol=1e-12)
    assert getattr(shifted, "num_steps", None) == getattr(plain, "num_steps", None)
    assert getattr(shifted, "sigma_min", 0) == 3 * getattr(plain, "sigma_min", 0)


def test_one_shift_is_that_of_the_papers(x64):
    """Simple diffusion's shifted cosine schedule (section 3.1), and the time shift of Stable Diffusion 3 (eq. 23)."""
    t = jnp.linspace(0, 1, 41)[1:-1]
    cosine = build("schedules", {"name": "shifted", "schedule": "trig", "shift": 256 / 64})
    np.testing.assert_allclose(cosine.log_snr(t), -2 * jnp.log(jnp.tan(jnp.pi * t / 2)) + 2 * np.log(64 / 256))
    ours = build("schedules", {"name": "shifted", "schedule": "flow", "shift": 3.0})
    flow = build("schedules", {"name": "flow", "shift": 3.0})
    for name in ("alpha", "sigma", "log_snr"):
        np.testing.assert_allclose(getattr(ours, name)(t), getattr(flow, name)(t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("mean", "scale"), [(0.0, 0.5), (1.0, 2.0)])
def test_laplace(x64, mean, scale):
    """Its log-SNR at uniform times, the table's, has the quantiles of a Laplace distribution (2407.03297, eq. 10)."""
    schedule = build("schedules", {"name": "laplace", "mean": mean, "scale": scale})
    t = np.arange(1, 1000) / 1000
    np.testing.assert_allclose(schedule.log_snr(jnp.asarray(t)), scipy.stats.laplace.isf(t, mean, scale), rtol=1e-9)


def test_zero_terminal_snr_keeps_the_first_point(x64):
    """Lin et al. 2024, algorithm 1: sqrt(alpha_bar) is shifted to end at 0 and scaled to keep its first value."""
    plain, rescaled = (build("schedules", {"name": "vp", "zero_terminal_snr": flag}) for flag in (False, True))
    points = jnp.arange(1, 1001) / 1000
    before, after = plain.alpha(points), rescaled.alpha(points)
    np.testing.assert_allclose(after, (before - before[-1]) * before[0] / (before[0] - before[-1]), atol=1e-12)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"name": "vp", "beta_start": 0.0}, "beta_start"),
        ({"name": "vp", "beta_end": 1.0}, "beta_end"),
        ({"name": "vp", "betas": "cosine", "beta_end": 0.5}, "beta_end"),
        ({"name": "vp", "num_steps": 0}, "num_steps"),
        ({"name": "vp", "num_steps": 1, "zero_terminal_snr": True}, "num_steps"),
        ({"name": "vp", "betas": "quadratic"}, "betas"),
        ({"name": "vp", "trained_betas": (0.1, 0.2)}, "num_steps"),
        ({"name": "vp", "trained_betas": (0.1, 0.2), "num_steps": 2, "beta_start": 0.1}, "beta_start"),
        *(
            ({"name": "vp", "trained_betas": betas, "num_steps": len(betas)}, "trained_betas")
            for betas in [(0.1, 0.0), (1.0, 0.1), (1.0,), (0.1, 1.5), (-0.1, 0.1)]
        ),
        ({"name": "laplace", "scale": 0.0}, "scale"),
        ({"name": "laplace", "num_steps": 1}, "num_steps"),
        ({"name": "shifted", "shift": 0.0}, "shift"),
        ({"name": "shifted", "schedule": "learned"}, "schedule"),
        ({"name": "shifted", "schedule": {"name": "flow", "shift": -1.0}}, "schedule.shift"),
        ({"name": "vp_sde", "beta_min": 0.0}, "beta_min"),
        ({"name": "vp_sde", "beta_max": 0.01}, "beta_max"),
        ({"name": "ve", "sigma_min": 0.0}, "sigma_min"),
        ({"name": "ve", "sigma_max": 0.001}, "sigma_max"),
        ({"name": "edm", "sigma_min": -1.0}, "sigma_min"),
        ({"name": "edm", "sigma_max": 0.001}, "sigma_max"),
        ({"name": "flow", "shift": 0.0}, "shift"),
        ({"name": "trig", "sigma_data": 0.0}, "sigma_data"),
        ({"name": "learned", "gamma_max": -20.0}, "gamma_max"),
        ({"name": "learned", "hidden": 0}, "hidden"),
    ],
)
def test_bad_options(spec, field):
    with refused(f"schedules.{field}"):
        build("schedules", spec)
