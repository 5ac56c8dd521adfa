"""The VP SDE of score_sde: a continuous variance preserving schedule with beta linear in t (Song et al. 2021, arXiv
2011.13456, appendix B and C)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.types import Array, InputError


@dataclasses.dataclass(frozen=True)
class VPSDE:
    """alpha^2 = exp(-B), B(t) = beta_min t + (beta_max - beta_min) t^2 / 2.

    The derivative of sigma is infinite at t = 0.
    """

    beta_min: float
    beta_max: float

    def alpha(self, t: Array) -> Array:
        return jnp.exp(-self._integral(t) / 2)

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(-jnp.expm1(-self._integral(t)))

    def log_snr(self, t: Array) -> Array:
        return -jnp.log(jnp.expm1(self._integral(t)))

    def time(self, log_snr: Array) -> Array:
        integral = jax.nn.softplus(-jnp.asarray(log_snr))
        # The root of a quadratic, in the form that avoids cancellation and allows beta_min = beta_max.
        slope = self.beta_max - self.beta_min
        return 2 * integral / (self.beta_min + jnp.sqrt(self.beta_min**2 + 2 * slope * integral))

    def _integral(self, t: Array) -> Array:
        t = jnp.asarray(t)
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2


def make(beta_min: float = 0.1, beta_max: float = 20.0) -> VPSDE:
    """Builds the schedule.

    Args:
      beta_min, beta_max: The rates of noise at t = 0 and t = 1; 0 < beta_min <= beta_max.
    """
    checks.positive(beta_min=beta_min)
    if beta_max < beta_min:
        raise InputError("beta_max", f"must be at least beta_min = {beta_min}, got {beta_max}")
    return VPSDE(beta_min, beta_max)
