"""The midpoint method with the midpoint in log(sigma): k-diffusion's `dpm_2`.

It is related to DPM-Solver-2, in the coordinates of Karras et al. 2022 (arXiv 2206.00364, algorithm 2 of appendix D).
With y = x / alpha, u = sigma / alpha and m the time at which log u_m = (log u_t + log u_s) / 2:

    y_m = y_t + (u_m - u_t) eps(x_t, t)
    y_s = y_t + (u_s - u_t) eps(x_m, m)
"""

import dataclasses
from typing import Any

import jax

from diffusion.core.types import Array, Denoiser, Schedule
from diffusion.sampling.ode.first_order import CoordinateName, OneStep, coordinate, first_order


@dataclasses.dataclass(frozen=True)
class DPM2(OneStep):
    """A second-order method. The last step, to sigma = 0, is an Euler step."""

    coordinate: CoordinateName = None

    def evaluations(self, steps: int, to_data: bool = True) -> int:
        return 2 * steps - to_data

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        ode = coordinate(self.coordinate, schedule)
        denoised = denoise(x, t)

        def second_order() -> Array:
            m = ode.midpoint(t, s)
            x_m = ode.move(x, ode.slope(x, denoised.x0, t), t, m)
            return ode.move(x, ode.slope(x_m, denoise(x_m, m).x0, m), t, s)

        moved = jax.lax.cond(schedule.sigma(s) > 0, second_order, lambda: first_order(schedule, x, denoised, t, s))
        return moved, denoised.x0, state


def make(coordinate: CoordinateName = None) -> DPM2:
    """Makes the midpoint sampler, with two evaluations per step and one in the last.

    Args:
      coordinate: the variables in which the ODE is solved: `noise_level` (x / alpha against sigma / alpha) or `time` (x
        against t, with the midpoint in t). By default `time` for schedules that end in pure noise (flows), otherwise
        `noise_level`.
    """
    return DPM2(coordinate)
