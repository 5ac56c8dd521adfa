"""DDIM (Song, Meng & Ermon 2021, arXiv 2010.02502, eq. 12 and 16)."""

import dataclasses

import jax.numpy as jnp

from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep, first_order


@dataclasses.dataclass(frozen=True)
class DDIM(OneStep):
    """eta = 0 is the deterministic sampler, and the Euler step of the probability-flow ODE; eta = 1 adds the noise of
    the ancestral sampler."""

    eta: float = 0.0
    uses_separate_eps = True

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        denoised = denoise(x, t)
        held = first_order(schedule, x, denoised, t, s)
        if self.eta == 0:
            return held
        alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
        # sigma_t^2 - (alpha_t / alpha_s)^2 sigma_s^2 is the variance of q(x_t | x_s).
        fresh = self.eta * sigma_s / sigma_t * jnp.sqrt(sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2)
        less = jnp.sqrt(jnp.maximum(sigma_s**2 - fresh**2, 0)) - sigma_s  # of the noise that x_t holds
        source = denoised.x0 if denoised.x0_for_eps is None else denoised.x0_for_eps
        return held + less / sigma_t * (x - alpha_t * source) + fresh * normal(keys, x.shape[1:], x.dtype)


def make(eta: float = 0.0) -> DDIM:
    """Args: `eta` in [0, 1], the share of the ancestral sampler's noise."""
    if not 0 <= eta <= 1:
        raise InputError("eta", f"must be in [0, 1], got {eta}")
    return DDIM(eta)
