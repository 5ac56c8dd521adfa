"""The straight path of flow matching and rectified flow (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv
2209.03003), with the time shift of Stable Diffusion 3 (Esser et al. 2024, arXiv 2403.03206, eq. 23)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.types import Array


@dataclasses.dataclass(frozen=True)
class Flow:
    """The straight path with a time shift: alpha = 1 - u, sigma = u, u = shift t / (1 + (shift - 1) t)."""

    shift: float

    def alpha(self, t: Array) -> Array:
        t = jnp.asarray(t)
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Array) -> Array:
        t = jnp.asarray(t)
        return self.shift * t / (1 + (self.shift - 1) * t)

    def log_snr(self, t: Array) -> Array:
        t = jnp.asarray(t)
        return 2 * (jnp.log1p(-t) - jnp.log(self.shift * t))

    def time(self, log_snr: Array) -> Array:
        u = jax.nn.sigmoid(-jnp.asarray(log_snr) / 2)
        return u / (self.shift - (self.shift - 1) * u)


def make(shift: float = 1.0) -> Flow:
    """Builds the straight path.

    Args:
      shift: Positive. 1 is the plain path; a larger shift spends more time at high noise, which suits high resolutions.
    """
    checks.positive(shift=shift)
    return Flow(shift)
