"""Euler's method on the probability-flow ODE.

    noise_level:  x_s / alpha_s = x_t / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) eps
    time:         x_s = x_t + (s - t) v,    v = alpha_t' x0 + sigma_t' eps

The first is DDIM (Song, Meng & Ermon 2021, arXiv 2010.02502, eq. 13) and algorithm 1 of Karras et al. 2022 (arXiv
2206.00364) without its second-order correction; the second is the usual sampler of flow matching (Lipman et al. 2023,
arXiv 2210.02747).
"""

import dataclasses
from typing import Any

from diffusion.core.types import Array, Denoiser, Schedule
from diffusion.sampling.ode.first_order import CoordinateName, OneStep, coordinate, first_order


@dataclasses.dataclass(frozen=True)
class Euler(OneStep):
    """A first-order method."""

    coordinate: CoordinateName = None
    elementwise = True

    @property
    def uses_separate_eps(self) -> bool:
        return self.coordinate != "time"

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        denoised = denoise(x, t)
        if self.coordinate != "time":
            return first_order(schedule, x, denoised, t, s), denoised.x0, state
        ode = coordinate(self.coordinate, schedule)
        return ode.move(x, ode.slope(x, denoised.x0, t), t, s), denoised.x0, state


def make(coordinate: CoordinateName = None) -> Euler:
    """Makes the Euler sampler, with one evaluation per step.

    Args:
      coordinate: the variables in which the ODE is solved: `noise_level` (x / alpha against sigma / alpha; the
        default), in which Euler is DDIM, or `time` (x against t). On the straight path of flow matching the two agree.
    """
    return Euler(coordinate)
