"""ER-SDE against SciPy's quadrature of the exact solution, for an x0 that is a polynomial of the noise level."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import integrate

from diffusion.core.arrays import fold, normal, sample_keys
from diffusion.core.build import build
from diffusion.core.types import Denoised
from diffusion.sampling.loop import sample


def phi(u):
    return u * (np.exp(u**0.3) + 10)


def slope(u):
    return np.exp(u**0.3) * (1 + 0.3 * u**0.3) + 10


def test_er_sde_integrates_the_polynomial(x64):
    """x0 is quadratic in u, so that the third step and all later ones of order 3 are exact."""
    schedule, levels = build("schedules", "edm"), np.array([3.0, 2.2, 1.1, 0.7, 0.2])
    times, x0 = jnp.asarray(levels / 80), lambda u: 0.3 - 0.8 * u + 0.25 * u**2
    x, keys = jnp.array([[2.0, -1.0]]), sample_keys(jax.random.key(0), jnp.arange(1))
    denoise = lambda x, t: Denoised(x0(80 * t) + 0 * x)  # noqa: E731
    path = sample(denoise, schedule, build("samplers", "er_sde"), x, times, keys, trajectory=True)
    for i in (2, 3):
        (start, end), ratio = levels[i : i + 2], phi(levels[i + 1]) / phi(levels[i])
        integral = integrate.quad(lambda u: slope(u) / phi(u) ** 2 * x0(u), end, start, epsabs=0, epsrel=1e-12)[0]
        noise = np.sqrt(end**2 - (ratio * start) ** 2) * normal(fold(keys, i + 1), (2,), jnp.float64)
        np.testing.assert_allclose(path[i + 1], ratio * path[i] + phi(end) * integral + noise, rtol=1e-9)
