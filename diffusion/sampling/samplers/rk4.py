"""The classical Runge-Kutta method of fourth order."""

import dataclasses

import jax

from diffusion.core.types import Array, Denoiser, Schedule
from diffusion.sampling.ode.first_order import CoordinateName, OneStep, coordinate, first_order


@dataclasses.dataclass(frozen=True)
class RK4(OneStep):
    """Fourth order. The last step, to sigma = 0, is Euler's."""

    coordinate: CoordinateName = None

    def evaluations(self, steps: int) -> int:
        return 4 * steps - 3

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        path = coordinate(self.coordinate, schedule)
        denoised = denoise(x, t)

        def fourth_order() -> Array:
            def slope(slope: Array, to: Array) -> Array:
                there = path.move(x, slope, t, to)
                return path.slope(there, denoise(there, to).x0, to)

            middle = path.time((path.at(t) + path.at(s)) / 2)
            k1 = path.slope(x, denoised.x0, t)
            k2 = slope(k1, middle)
            k3 = slope(k2, middle)
            k4 = slope(k3, s)
            return path.move(x, (k1 + 2 * k2 + 2 * k3 + k4) / 6, t, s)

        return jax.lax.cond(schedule.sigma(s) > 0, fourth_order, lambda: first_order(schedule, x, denoised, t, s))


def make(coordinate: CoordinateName = None) -> RK4:
    """Four evaluations a step, one in the last.

    Args:
      coordinate: what the ODE is read in: `noise_level` (x / alpha against sigma / alpha) or `time` (x against t).
        Default: `time` where the schedule ends in pure noise (flows), else `noise_level`.
    """
    return RK4(coordinate)
