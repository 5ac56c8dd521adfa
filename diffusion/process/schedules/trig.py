"""The trigonometric path, a quarter circle at constant speed.

It is variance preserving for data of standard deviation `sigma_data` (Albergo & Vanden-Eijnden 2023, arXiv 2209.15571;
the GVP path of SiT, arXiv 2401.08740; TrigFlow of Lu & Song 2024, arXiv 2410.11081).
"""

import dataclasses

import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.types import Array

_QUARTER = jnp.pi / 2


@dataclasses.dataclass(frozen=True)
class Trig:
    """alpha = cos(pi t / 2), sigma = sigma_data sin(pi t / 2)."""

    sigma_data: float = 1.0

    def alpha(self, t: Array) -> Array:
        return jnp.sin(_QUARTER * (1 - jnp.asarray(t)))  # cos(pi / 2) is not exactly 0 in floating point

    def sigma(self, t: Array) -> Array:
        return self.sigma_data * jnp.sin(_QUARTER * jnp.asarray(t))

    def log_snr(self, t: Array) -> Array:
        return 2 * (jnp.log(self.alpha(t)) - jnp.log(self.sigma(t)))

    def time(self, log_snr: Array) -> Array:
        return jnp.arctan(jnp.exp(-jnp.asarray(log_snr) / 2) / self.sigma_data) / _QUARTER


def make(sigma_data: float = 1.0) -> Trig:
    """Builds the trigonometric path.

    Args:
      sigma_data: Standard deviation of the pure noise; on TrigFlow's path it equals that of the data.
    """
    checks.positive(sigma_data=sigma_data)
    return Trig(sigma_data)
