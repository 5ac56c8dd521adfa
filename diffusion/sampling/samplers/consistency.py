"""Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1).

With f the consistency model, which maps x_t to the point of the same ODE trajectory at the noise level sigma_min:

    x_s = alpha_s f(x_t, t) + sqrt(sigma_s^2 - (alpha_s sigma_min)^2) z

In the paper alpha = 1 and sigma = t, so that this is x + sqrt(tau^2 - epsilon^2) z with epsilon = sigma_min.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep


@dataclasses.dataclass(frozen=True)
class ConsistencySampler(OneStep):
    """Jumps to the end of the ODE trajectory, and back to time s with fresh noise."""

    sigma_min: float = 0.002
    few_step = True
    stochastic = True
    elementwise = True

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        denoised = denoise(x, t)
        if denoised.kind != "consistency":
            raise InputError(
                "sampler.name",
                "requires a consistency model, but this one predicts the mean of x0; use ddim",
            )
        # The model's output already contains noise of level sigma_min, so that the fresh noise is reduced by it.
        low = self.sigma_min * schedule.alpha(s)
        fresh = jnp.sqrt(jnp.maximum(schedule.sigma(s) ** 2 - low**2, 0))
        moved = schedule.alpha(s) * denoised.x0 + fresh * normal(keys, x.shape[1:], x.dtype)
        return moved, denoised.x0, state


def make(sigma_min: float = 0.002) -> ConsistencySampler:
    """Makes the consistency sampler, with one evaluation per step.

    Args:
      sigma_min: the noise level sigma / alpha of the model's boundary, at which it returns its input.
    """
    checks.at_least(0, sigma_min=sigma_min)
    return ConsistencySampler(sigma_min)
