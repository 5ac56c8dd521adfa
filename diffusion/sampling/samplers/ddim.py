"""DDIM (Song, Meng & Ermon 2021, arXiv 2010.02502, eq. 12 and 16).

    x_s   = alpha_s x0 + sqrt(sigma_s^2 - fresh^2) eps + fresh z                                          (eq. 12)
    fresh = eta (sigma_s / sigma_t) sqrt(sigma_t^2 - (alpha_t sigma_s / alpha_s)^2)                       (eq. 16)

The paper writes sqrt(alpha_t) for alpha_t here, sqrt(1 - alpha_t) for sigma_t, and sigma_t for `fresh`.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep, first_order


@dataclasses.dataclass(frozen=True)
class DDIM(OneStep):
    """The DDIM sampler.

    eta = 0 is deterministic and the Euler step of the probability-flow ODE; eta = 1 is the ancestral sampler.
    """

    eta: float = 0.0
    uses_separate_eps = True
    elementwise = True

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        denoised = denoise(x, t)
        deterministic = first_order(schedule, x, denoised, t, s)
        if self.eta == 0:
            return deterministic, denoised.x0, state
        alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
        # The variance of q(x_t | x_s). For s = t the difference is a rounding error.
        variance = jnp.maximum(sigma_t**2 - (alpha_t / alpha_s * sigma_s) ** 2, 0)
        fresh = self.eta * sigma_s / sigma_t * jnp.sqrt(variance)
        change = jnp.sqrt(jnp.maximum(sigma_s**2 - fresh**2, 0)) - sigma_s  # of the coefficient of eps
        x0 = denoised.x0 if denoised.x0_for_eps is None else denoised.x0_for_eps
        noise = normal(keys, x.shape[1:], x.dtype)
        return deterministic + change / sigma_t * (x - alpha_t * x0) + fresh * noise, denoised.x0, state


def make(eta: float = 0.0) -> DDIM:
    """Makes the DDIM sampler, with one evaluation per step.

    Args:
      eta: the fraction of the ancestral sampler's noise, in [0, 1].
    """
    if not 0 <= eta <= 1:
        raise InputError("eta", f"must be in [0, 1], got {eta}")
    return DDIM(eta)
