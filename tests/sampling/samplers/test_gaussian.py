"""Samplers on data N(0, s^2), whose denoiser, ODE solution and variance after each step are closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build, find
from diffusion.core.types import Denoised
from diffusion.sampling.loop import sample

STD = 0.5


def optimal(schedule, std=STD):
    """Returns E[x0 | x_t] for data N(0, std^2)."""

    def denoise(x, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return Denoised(alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x)

    return denoise


def marginal_std(schedule, t, std=STD):
    return jnp.sqrt(schedule.alpha(t) ** 2 * std**2 + schedule.sigma(t) ** 2)


def test_ddim_is_first_order_on_the_ode(x64):
    """The ODE scales x by the ratio of the marginals' standard deviations.

    The constant is checked too: evaluating at the next time would keep the order and multiply the error.
    """
    schedule = build("schedules", "vp")
    x = jnp.ones((1, 1))
    exact = x / marginal_std(schedule, 1.0) * STD
    errors = []
    for steps in (50, 100, 200):
        times = jnp.asarray(find("grids", "trailing", field="grid")(schedule, steps))
        out = sample(optimal(schedule), schedule, build("samplers", "ddim"), x, times, jax.random.key(0))
        errors.append(abs(float((out - exact)[0, 0])) / STD)
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(slopes, 1, atol=0.15)
    t, s = times[:-1], times[1:]
    ratio = schedule.sigma(s) / schedule.sigma(t)
    gain = schedule.alpha(t) * STD**2 / marginal_std(schedule, t) ** 2
    factors = ratio + (schedule.alpha(s) - schedule.alpha(t) * ratio) * gain
    np.testing.assert_allclose(out, x * np.prod(factors), rtol=1e-10)


def test_euler_on_the_karras_grid(x64):
    """N Euler steps from sigma = 20 to 0.02 have known errors of the standard deviation, and a closed-form product."""
    schedule = build("schedules", {"name": "edm", "sigma_min": 0.02, "sigma_max": 20.0})
    exact = (STD**2 + 0.02**2) ** 0.5
    for steps, error in ((10, 8.5e-2), (20, 4.5e-2), (100, 9.4e-3), (1000, 1.1e-3)):
        times = jnp.asarray(find("grids", "karras", field="grid")(schedule, steps + 1)[:-1])
        x = sample(
            optimal(schedule), schedule, build("samplers", "ddim"), jnp.full((1, 1), 20.0), times, jax.random.key(0)
        )
        sigma = 20 * times
        product = 20 * jnp.prod(1 + jnp.diff(sigma) * sigma[:-1] / (sigma[:-1] ** 2 + STD**2))
        np.testing.assert_allclose(x[0, 0], product, rtol=1e-9)
        np.testing.assert_allclose(abs(x[0, 0] - exact), error, rtol=0.02)


@pytest.mark.parametrize("schedule", ["flow", "trig", {"name": "vp", "zero_terminal_snr": True}], ids=str)
def test_first_step_from_pure_noise_is_finite(schedule):
    schedule = build("schedules", schedule)
    times = jnp.array([1.0, 0.5, 0.0], jnp.float32)
    keys = jax.random.split(jax.random.key(0), 3)
    for sampler in ("ddim", {"name": "ddim", "eta": 1.0}, "ancestral"):
        x = sample(optimal(schedule), schedule, build("samplers", sampler), jnp.ones((3, 2)), times, keys)
        assert np.isfinite(x).all()


def std_after(sampler, num_steps, std):
    """Returns the exact standard deviation of a linear sampler's output, from the gain and the noise of each step."""
    schedule = build("schedules", {"name": "vp", "num_steps": num_steps, **betas_of(num_steps)})
    sampler = build("samplers", sampler)
    times = jnp.arange(num_steps, -1, -1) / num_steps
    keys = jax.random.split(jax.random.key(0), 1)
    denoise, variance = optimal(schedule, std), 1.0
    step = jax.vmap(lambda x, t, s: sampler.step(x, (), denoise, schedule, t, s, keys)[0][0, 0], (None, 0, 0))
    noise, gain = jax.jit(lambda t, s: (at_0 := step(jnp.zeros((1, 1)), t, s), step(jnp.ones((1, 1)), t, s) - at_0))(
        times[:-1], times[1:]
    )
    unit = jax.random.normal(keys[0], (1,), jnp.float64)
    for of_x, added in zip(np.asarray(gain), np.asarray(noise / unit), strict=True):
        variance = variance * of_x**2 + added**2
    return variance**0.5


def betas_of(num_steps):
    """Returns the betas of Ho et al. 2020 for a chain of any length."""
    return {"beta_start": 0.1 / num_steps, "beta_end": min(20 / num_steps, 0.999)}


@pytest.mark.parametrize("num_steps", [50, 1000])
def test_ancestral_variance_of_unit_data(x64, num_steps):
    """On N(0, 1), `beta` is exact for every step but the last, which adds no noise; `beta_tilde` is too small."""
    first_beta = betas_of(num_steps)["beta_start"]
    beta = std_after({"name": "ancestral", "variance": "beta"}, num_steps, std=1.0)
    np.testing.assert_allclose(beta, (1 - first_beta) ** 0.5, rtol=1e-9)
    tilde = std_after({"name": "ancestral", "variance": "beta_tilde"}, num_steps, std=1.0)
    np.testing.assert_allclose(tilde, {50: 0.925, 1000: 0.9955}[num_steps], atol=2e-3)


def test_ddim_with_eta_one_is_ancestral(x64):
    schedule = build("schedules", "vp")
    x = jax.random.normal(jax.random.key(1), (4, 3), jnp.float64)
    keys = jax.random.split(jax.random.key(2), 4)
    for t, s in ((1.0, 0.9), (0.5, 0.001), (0.02, 0.0)):
        args = (x, (), optimal(schedule), schedule, jnp.float64(t), jnp.float64(s), keys)
        ddim = build("samplers", {"name": "ddim", "eta": 1.0}).step(*args)[0]
        ancestral = build("samplers", "ancestral").step(*args)[0]
        np.testing.assert_allclose(ddim, ancestral, rtol=1e-9)
