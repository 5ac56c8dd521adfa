"""Ancestral sampling of the reverse chain (Ho et al. 2020, arXiv 2006.11239, algorithm 2)."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from diffusion.arrays import normal
from diffusion.posterior import posterior
from diffusion.types import Array, Denoiser, InputError, Schedule


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """Draws x_s from q(x_s | x_t, x0) at the denoiser's x0. The last step, to sigma = 0, is the mean."""

    variance: Literal["beta", "beta_tilde", "learned"] = "beta_tilde"

    def init(self, x: Array, times: Array) -> Array:
        return x

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        denoised = denoise(x, t)
        reverse = posterior(schedule, t, s)
        if self.variance == "learned":
            if denoised.log_variance is None:
                raise InputError("sampler.variance", "the model has learned no variance; use 'beta' or 'beta_tilde'")
            std = jnp.exp(reverse.log_variance(denoised.log_variance) / 2)
        else:
            std = jnp.sqrt({"beta": reverse.beta, "beta_tilde": reverse.beta_tilde}[self.variance])
        noise = jnp.where(schedule.sigma(s) > 0, std, 0) * normal(keys, x.shape[1:], x.dtype)
        return reverse.from_x * x + reverse.from_x0 * denoised.x0 + noise

    def finish(self, x: Array) -> Array:
        return x


def make(variance: Literal["beta", "beta_tilde", "learned"] = "beta_tilde") -> Ancestral:
    """Args: `variance` of a step: that of q(x_t | x_s) (`beta`, right for data of unit variance), that of
    q(x_s | x_t, x0) (`beta_tilde`, right for a single point), or the model's own between them (`learned`)."""
    return Ancestral(variance)
