"""The variance exploding schedule of score_sde (Song et al. 2021, arXiv 2011.13456, eq. 30)."""

import dataclasses
import math

import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.types import Array, InputError


@dataclasses.dataclass(frozen=True)
class VE:
    """alpha = 1, sigma^2 = sigma_min^2 ((sigma_max / sigma_min)^(2t) - 1), the variance of the SDE.

    It is 0 at t = 0, where the derivative of sigma is infinite.
    """

    sigma_min: float
    sigma_max: float

    def alpha(self, t: Array) -> Array:
        return jnp.ones_like(t)

    def sigma(self, t: Array) -> Array:
        return self.sigma_min * jnp.sqrt(jnp.expm1(self._rate * jnp.asarray(t)))

    def log_snr(self, t: Array) -> Array:
        return -2 * jnp.log(self.sigma(t))

    def time(self, log_snr: Array) -> Array:
        return jnp.log1p(jnp.exp(-jnp.asarray(log_snr)) / self.sigma_min**2) / self._rate

    @property
    def _rate(self) -> float:
        return 2 * math.log(self.sigma_max / self.sigma_min)


def make(sigma_min: float = 0.01, sigma_max: float = 50.0) -> VE:
    """Builds the variance exploding schedule.

    Args:
      sigma_min, sigma_max: Noise levels in units of the data; 0 < sigma_min < sigma_max.
    """
    checks.positive(sigma_min=sigma_min)
    if sigma_max <= sigma_min:
        raise InputError("sigma_max", f"must be above sigma_min = {sigma_min}, got {sigma_max}")
    return VE(sigma_min, sigma_max)
