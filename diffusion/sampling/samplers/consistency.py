"""Multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1)."""

import dataclasses

import jax.numpy as jnp

from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep


@dataclasses.dataclass(frozen=True)
class ConsistencySampler(OneStep):
    """To the end of the path at one stroke, and back to time s with fresh noise."""

    sigma_min: float = 0.002
    stochastic = True

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        denoised = denoise(x, t)
        if denoised.kind != "consistency":
            raise InputError(
                "sampler.name", "samples consistency models, and this model gives the mean of x0; use ddim or unipc"
            )
        # The model's answer is at the level sigma_min already, so that much less noise is missing.
        low = self.sigma_min * schedule.alpha(s)
        fresh = jnp.sqrt(jnp.maximum(schedule.sigma(s) ** 2 - low**2, 0))
        return schedule.alpha(s) * denoised.x0 + fresh * normal(keys, x.shape[1:], x.dtype)


def make(sigma_min: float = 0.002) -> ConsistencySampler:
    """One evaluation a step.

    Args:
      sigma_min: the level sigma / alpha of the model's boundary, where it gives back what it is given.
    """
    if sigma_min < 0:
        raise InputError("sigma_min", f"must be at least 0, got {sigma_min}")
    return ConsistencySampler(sigma_min)
