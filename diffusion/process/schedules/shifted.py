"""Another schedule at a higher or lower noise level, for another resolution.

The average of s x s pixels has s times less noise than a single one, so that an image of s times the side needs
`shift = s` to lose as much information at the same t. For `trig` this is the shifted cosine schedule of simple
diffusion (Hoogeboom et al. 2023, arXiv 2301.11093, section 3.1). For `flow` it is the time shift of Stable Diffusion 3
(Esser et al. 2024, arXiv 2403.03206, eq. 23), which `flow` also has as an option.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks
from diffusion.core.build import build
from diffusion.core.types import Array, InputError, Schedule

ScheduleSpec = Annotated[str | Mapping[str, Any] | Callable[..., Any], "schedules"]


@dataclasses.dataclass(frozen=True)
class Shifted:
    """The noise level sigma / alpha of another schedule, times `shift`.

    Attributes:
      base: The other schedule.
      shift: The factor.
      keeps: What is as in the other schedule: its `alpha` (variance exploding paths), `sum` alpha + sigma (straight
        paths) or `power` alpha^2 + sigma^2 (all others).
    """

    base: Schedule
    shift: float
    keeps: Literal["alpha", "sum", "power"]

    @property
    def num_steps(self) -> int:
        return self.base.num_steps

    @property
    def sigma_min(self) -> float:
        return self.shift * self.base.sigma_min

    def alpha(self, t: Array) -> Array:
        alpha, sigma = self.base.alpha(t), self.base.sigma(t)
        return alpha / self._size(alpha, self.shift * sigma) * self._size(alpha, sigma)

    def sigma(self, t: Array) -> Array:
        alpha, sigma = self.base.alpha(t), self.base.sigma(t)
        return self.shift * sigma / self._size(alpha, self.shift * sigma) * self._size(alpha, sigma)

    def log_snr(self, t: Array) -> Array:
        return self.base.log_snr(t) - 2 * math.log(self.shift)

    def time(self, log_snr: Array) -> Array:
        return self.base.time(jnp.asarray(log_snr) + 2 * math.log(self.shift))

    def _size(self, alpha: Array, sigma: Array) -> Array:
        if self.keeps == "power":
            return jnp.sqrt(alpha**2 + sigma**2)
        return alpha if self.keeps == "alpha" else alpha + sigma


def make(schedule: ScheduleSpec = "trig", shift: float = 1.0) -> Shifted:
    """Builds the shifted schedule.

    Args:
      schedule: Any schedule that is not learned.
      shift: The factor of sigma / alpha, positive: 2 log(shift) is subtracted from the log-SNR. Above 1 there is more
        noise at the same t. For a model that was designed at a side of d pixels, it is side / d.
    """
    checks.positive(shift=shift)
    base = build("schedules", schedule, field="schedule")
    if hasattr(base, "at"):
        raise InputError("schedule", "must not be learned, because training moves its ends; use another schedule")
    with jax.ensure_compile_time_eval():
        alpha, sigma = (np.asarray(coefficient(jnp.float32([0.25, 0.5]))) for coefficient in (base.alpha, base.sigma))
    straight = "sum" if np.allclose(alpha + sigma, 1) else "power"
    return Shifted(base, shift, "alpha" if (alpha == 1).all() else straight)
