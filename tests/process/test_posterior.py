import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import Denoised
from diffusion.process.posterior import posterior, x0_errors


def test_matches_ho_et_al_on_a_table(x64):
    """Ho et al. 2020, eq. 7, in terms of the betas and their cumulative product."""
    schedule = build("schedules", {"name": "vp", "num_steps": 20})
    betas = np.linspace(1e-4, 0.02, 20)
    alpha_bar = np.cumprod(1 - betas)
    i = 7
    reverse = posterior(schedule, jnp.float64((i + 1) / 20), jnp.float64(i / 20))
    np.testing.assert_allclose(reverse.beta, betas[i], rtol=1e-9)
    tilde = (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * betas[i]
    np.testing.assert_allclose(reverse.beta_tilde, tilde, rtol=1e-9)
    np.testing.assert_allclose(reverse.from_x0, alpha_bar[i - 1] ** 0.5 * betas[i] / (1 - alpha_bar[i]), rtol=1e-9)
    from_x = (1 - betas[i]) ** 0.5 * (1 - alpha_bar[i - 1]) / (1 - alpha_bar[i])
    np.testing.assert_allclose(reverse.from_x, from_x, rtol=1e-9)
    np.testing.assert_allclose(np.exp(reverse.log_variance(0.25)), betas[i] ** 0.25 * tilde**0.75, rtol=1e-9)


@pytest.mark.parametrize("schedule", ["vp_sde", "ve", "edm", "flow", "trig", {"name": "vp", "zero_terminal_snr": True}])
def test_bayes(x64, schedule):
    """The coefficients follow from the joint covariance of (x_s, x_t) given x0."""
    schedule = build("schedules", schedule)
    s, t = jnp.float64(0.3), jnp.float64(0.8)
    reverse = posterior(schedule, t, s)
    a_t, a_s, v_t, v_s = schedule.alpha(t), schedule.alpha(s), schedule.sigma(t) ** 2, schedule.sigma(s) ** 2
    covariance = a_t / a_s * v_s
    np.testing.assert_allclose(reverse.from_x, covariance / v_t, rtol=1e-9)
    np.testing.assert_allclose(reverse.from_x0, a_s - covariance / v_t * a_t, rtol=1e-9)
    np.testing.assert_allclose(reverse.beta_tilde, v_s - covariance**2 / v_t, rtol=1e-9)


def test_last_step_and_first_step_from_pure_noise_are_finite():
    schedule = build("schedules", "flow")
    last = posterior(schedule, jnp.float32(0.1), jnp.float32(0))
    assert last.from_x == 0 and last.from_x0 == 1 and last.beta_tilde == 0
    first = posterior(schedule, jnp.float32(1), jnp.float32(0.9))
    assert first.from_x == 0 and np.isclose(first.from_x0, 0.1) and np.isfinite(first.beta)


def test_the_optimal_variance_preserves_the_marginals(x64):
    """For data N(0, v), the step to s with variance `optimal` maps the marginal at t exactly to that at s."""
    schedule, v = build("schedules", "vp"), 0.3
    t, s = jnp.float64(0.6), jnp.float64(0.2)
    marginal_t, marginal_s = (schedule.alpha(a) ** 2 * v + schedule.sigma(a) ** 2 for a in (t, s))
    gain = schedule.alpha(t) * v / marginal_t  # E[x0 | x_t] = gain x_t
    reverse = posterior(schedule, t, s)
    step = reverse.from_x + reverse.from_x0 * gain
    error = v * schedule.sigma(t) ** 2 / marginal_t
    np.testing.assert_allclose(step**2 * marginal_t + reverse.optimal(error), marginal_s, rtol=1e-9)


def test_x0_errors_match_the_closed_form():
    schedule, v = build("schedules", "vp"), 0.3
    x0 = v**0.5 * jax.random.normal(jax.random.key(0), (50000, 1))

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return Denoised(alpha * v / (alpha**2 * v + sigma**2) * x)

    found = x0_errors(denoise, schedule, x0, jnp.array([0.7, 0.2]), jax.random.key(1))
    assert [t for t, _ in found] == pytest.approx([0.2, 0.7])
    for t, error in found:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        np.testing.assert_allclose(error, v * sigma**2 / (alpha**2 * v + sigma**2), rtol=0.02)
