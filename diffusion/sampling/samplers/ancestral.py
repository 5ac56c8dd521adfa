"""Ancestral sampling of the reverse chain (Ho et al. 2020, arXiv 2006.11239, algorithm 2).

    x_s = mu(x_t, x0) + sqrt(v) z
    mu  = (alpha_t / alpha_s) (sigma_s / sigma_t)^2 x_t + alpha_s (beta / sigma_t^2) x0                   (eq. 7)
    v   = beta = sigma_t^2 - (alpha_t sigma_s / alpha_s)^2, the variance of q(x_t | x_s), or
          beta_tilde = beta (sigma_s / sigma_t)^2, the variance of q(x_s | x_t, x0)                       (eq. 7)

With alpha_t = sqrt(alpha_bar_t), sigma_t = sqrt(1 - alpha_bar_t) and s the previous time step, these are the paper's.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoised, Denoiser, InputError, Schedule
from diffusion.process.posterior import Posterior, posterior
from diffusion.sampling.ode.first_order import OneStep

Variance = Literal["beta", "beta_tilde", "learned", "analytic"]


@dataclasses.dataclass(frozen=True)
class Ancestral(OneStep):
    """Draws x_s from q(x_s | x_t, x0) at the denoiser's x0. The last step, to sigma = 0, returns the mean."""

    variance: Variance = "beta_tilde"
    x0_errors: tuple[tuple[float, float], ...] = ()
    stochastic = True
    elementwise = True

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        denoised = denoise(x, t)
        reverse = posterior(schedule, t, s)
        std = jnp.sqrt(self._variance(reverse, denoised, t))
        noise = jnp.where(schedule.sigma(s) > 0, std, 0) * normal(keys, x.shape[1:], x.dtype)
        return reverse.from_x * x + reverse.from_x0 * denoised.x0 + noise, denoised.x0, state

    def _variance(self, reverse: Posterior, denoised: Denoised, t: Array) -> Array:
        if self.variance == "learned":
            if denoised.log_variance is None:
                raise InputError("sampler.variance", "the model has no learned variance; use beta or beta_tilde")
            return jnp.exp(reverse.log_variance(denoised.log_variance))
        if self.variance == "analytic":
            times, errors = (jnp.asarray(column, t.dtype) for column in np.array(self.x0_errors).T)
            return reverse.optimal(jnp.interp(t, times, errors))
        return {"beta": reverse.beta, "beta_tilde": reverse.beta_tilde}[self.variance]


def make(variance: Variance = "beta_tilde", x0_errors: tuple[tuple[float, float], ...] = ()) -> Ancestral:
    """Makes the ancestral sampler, with one evaluation per step.

    Args:
      variance: v of the module's docstring. `beta` is exact for data of unit variance and `beta_tilde` for a single
        point. `learned` is the model's own variance, between these two. `analytic` is the optimal variance for the
        model's mean (Bao et al. 2022, arXiv 2201.06503).
      x0_errors: required by `analytic`: pairs of a time, increasing, and the mean square error of the model's x0 at
        this time (`posterior.x0_errors`), which are interpolated. The sampling jobs measure them on the run's own data.
    """
    if (variance == "analytic") != bool(x0_errors):
        raise InputError("x0_errors", "must be given if and only if variance = 'analytic'; measure them on a run")
    if x0_errors and not (np.diff(np.array(x0_errors)[:, 0]) > 0).all():
        raise InputError("x0_errors", "must be pairs (t, mean square error of x0) with increasing t")
    return Ancestral(variance, x0_errors)
