"""Ancestral sampling of the reverse chain (Ho et al. 2020, arXiv 2006.11239, algorithm 2)."""

import dataclasses
from typing import Literal

import jax.numpy as jnp

from diffusion.arrays import normal
from diffusion.types import Array, Denoiser, Schedule


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """Draws x_s from q(x_s | x_t, x0) at the denoiser's x0, with one of the paper's two variances."""

    variance: Literal["beta", "beta_tilde"] = "beta_tilde"

    def init(self, x: Array, times: Array) -> Array:
        return x

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        x0 = denoise(x, t).x0
        alpha_t, sigma_t, alpha_s, sigma_s = schedule.alpha(t), schedule.sigma(t), schedule.alpha(s), schedule.sigma(s)
        alpha_ts = alpha_t / alpha_s
        beta = sigma_t**2 - (alpha_ts * sigma_s) ** 2  # the variance of q(x_t | x_s)
        mean = alpha_ts * (sigma_s / sigma_t) ** 2 * x + alpha_s * beta / sigma_t**2 * x0
        variance = {"beta": beta, "beta_tilde": beta * (sigma_s / sigma_t) ** 2}[self.variance]
        variance = jnp.where(sigma_s > 0, variance, 0)  # the last step is the mean
        return mean + jnp.sqrt(variance) * normal(keys, x.shape[1:], x.dtype)

    def finish(self, x: Array) -> Array:
        return x


def make(variance: Literal["beta", "beta_tilde"] = "beta_tilde") -> Ancestral:
    """Args: `variance` of a step: that of q(x_t | x_s) (`beta`, right for data of unit variance), or that of
    q(x_s | x_t, x0) (`beta_tilde`, right for a single point)."""
    return Ancestral(variance)
