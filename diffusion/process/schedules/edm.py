"""EDM's schedule, whose time is proportional to the noise level (Karras et al. 2022, arXiv 2206.00364, table 1)."""

import dataclasses

import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.types import Array, InputError


@dataclasses.dataclass(frozen=True)
class EDM:
    """alpha = 1, sigma = sigma_max t. Nothing is trained or evaluated at 0 < sigma < sigma_min."""

    sigma_min: float
    sigma_max: float

    def alpha(self, t: Array) -> Array:
        return jnp.ones_like(t)

    def sigma(self, t: Array) -> Array:
        return self.sigma_max * jnp.asarray(t)

    def log_snr(self, t: Array) -> Array:
        return -2 * jnp.log(self.sigma(t))

    def time(self, log_snr: Array) -> Array:
        return jnp.exp(-jnp.asarray(log_snr) / 2) / self.sigma_max


def make(sigma_min: float = 0.002, sigma_max: float = 80.0) -> EDM:
    """Builds EDM's schedule.

    Args:
      sigma_min, sigma_max: Noise levels in units of the data; 0 < sigma_min < sigma_max.
    """
    checks.positive(sigma_min=sigma_min)
    if sigma_max <= sigma_min:
        raise InputError("sigma_max", f"must be above sigma_min = {sigma_min}, got {sigma_max}")
    return EDM(sigma_min, sigma_max)
