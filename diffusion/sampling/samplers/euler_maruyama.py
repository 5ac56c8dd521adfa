"""Euler-Maruyama on the reverse SDE with any amount of noise (SiT; Ma et al. 2024, arXiv 2401.08740, eq. 4).

The reverse-time SDE dx = (v - w score / 2) dt + sqrt(w) dW has the marginals of the ODE for every w(t) >= 0. With
v = alpha_t' x0 + sigma_t' eps and score = -eps / sigma_t:

    x_s = x_t + (s - t) (v + (w / 2) eps / sigma_t) + sqrt(w |s - t|) z

With `diffusion="sbdm"`, w = g(t)^2 is the variance of the forward SDE, and this is the sampler of score_sde (Song et
al. 2021, arXiv 2011.13456, eq. 6).
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import derivative, normal
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep, Time, ends_in_noise, eps_of, first_order

Diffusion = Literal["sigma", "constant", "sin2", "sbdm"]


@dataclasses.dataclass(frozen=True)
class EulerMaruyama(OneStep):
    """A first-order method. The last step, to sigma = 0, is a deterministic step to the denoiser's x0."""

    diffusion: Diffusion = "sigma"
    scale: float = 1.0
    elementwise = True

    @property
    def stochastic(self) -> bool:
        return self.scale > 0

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        denoised, ode = denoise(x, t), Time(schedule)
        w, sigma = self._diffusion(schedule, t), schedule.sigma(t)
        drift = ode.slope(x, denoised.x0, t) + w / 2 * eps_of(schedule, x, denoised.x0, t) / sigma
        moved = ode.move(x, drift, t, s) + jnp.sqrt(w * jnp.abs(t - s)) * normal(keys, x.shape[1:], x.dtype)
        moved = jnp.where(schedule.sigma(s) > 0, moved, first_order(schedule, x, denoised, t, s))
        return moved, denoised.x0, state

    def _diffusion(self, schedule: Schedule, t: Array) -> Array:
        """Returns w(t)."""
        if self.diffusion == "sbdm":
            if ends_in_noise(schedule):
                raise InputError(
                    "sampler.diffusion",
                    "must not be sbdm for this schedule, where it is infinite at t = 1; use sigma",
                )
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            w = 2 * sigma * (derivative(schedule.sigma, t) - derivative(schedule.alpha, t) / alpha * sigma)
        else:
            w = {"sigma": schedule.sigma(t), "constant": jnp.ones_like(t), "sin2": jnp.sin(jnp.pi * t) ** 2}[
                self.diffusion
            ]
        return self.scale * w


def make(diffusion: Diffusion = "sigma", scale: float = 1.0) -> EulerMaruyama:
    """Makes the Euler-Maruyama sampler, with one evaluation per step.

    Args:
      diffusion: w(t), the variance of the noise per unit of t: `sigma` for w = sigma_t (SiT's choice for flows),
        `constant` for 1, `sin2` for sin(pi t)^2 (0 at both ends), or `sbdm` for that of the forward SDE.
      scale: a factor of w; 0 is Euler's method in t.
    """
    checks.at_least(0, scale=scale)
    return EulerMaruyama(diffusion, scale)
