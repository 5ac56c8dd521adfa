"""Euler-Maruyama on the reverse SDE with any amount of noise: SiT's sampler for flows (Ma et al. 2024, arXiv
2401.08740, eq. 4), and with `diffusion="sbdm"` score_sde's (Song et al. 2021, arXiv 2011.13456, eq. 6)."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from diffusion.core.arrays import derivative, normal
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep, Time, ends_in_noise, eps_of, first_order

Diffusion = Literal["sigma", "constant", "sin2", "sbdm"]


@dataclasses.dataclass(frozen=True)
class EulerMaruyama(OneStep):
    """dx = (v - w score / 2) dt + sqrt(w) dW, backwards, has the same marginals for every w(t) >= 0. The last step, to
    sigma = 0, is to the mean."""

    diffusion: Diffusion = "sigma"
    scale: float = 1.0

    @property
    def stochastic(self) -> bool:
        return self.scale > 0

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        denoised, path = denoise(x, t), Time(schedule)
        w, sigma = self._noise(schedule, t), schedule.sigma(t)
        drift = path.slope(x, denoised.x0, t) + w / 2 * eps_of(schedule, x, denoised.x0, t) / sigma
        moved = path.move(x, drift, t, s) + jnp.sqrt(w * jnp.abs(t - s)) * normal(keys, x.shape[1:], x.dtype)
        return jnp.where(schedule.sigma(s) > 0, moved, first_order(schedule, x, denoised, t, s))

    def _noise(self, schedule: Schedule, t: Array) -> Array:
        """w(t)."""
        if self.diffusion == "sbdm":
            if ends_in_noise(schedule):
                raise InputError("sampler.diffusion", "sbdm is infinite at t = 1 of this schedule; use sigma")
            alpha, sigma = schedule.alpha(t), schedule.sigma(t)
            w = 2 * sigma * (derivative(schedule.sigma, t) - derivative(schedule.alpha, t) / alpha * sigma)
        else:
            w = {"sigma": schedule.sigma(t), "constant": jnp.ones_like(t), "sin2": jnp.sin(jnp.pi * t) ** 2}[
                self.diffusion
            ]
        return self.scale * w


def make(diffusion: Diffusion = "sigma", scale: float = 1.0) -> EulerMaruyama:
    """One evaluation a step.

    Args:
      diffusion: w(t), the variance of the noise per unit of t: `sigma` as t runs (SiT's choice for flows), `constant`,
        `sin2` (none at either end), or `sbdm`, that of the forward SDE.
      scale: it is multiplied by; 0 is Euler's method in t.
    """
    if scale < 0:
        raise InputError("scale", f"must be at least 0, got {scale}")
    return EulerMaruyama(diffusion, scale)
