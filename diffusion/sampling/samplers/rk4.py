"""The classical fourth-order Runge-Kutta method on the probability-flow ODE dy/du = f(y, u).

With y = x / alpha, u = sigma / alpha and f = eps, or y = x, u = t and f the velocity; h = u_s - u_t:

    k1 = f(y, u_t),    k2 = f(y + h k1 / 2, u_t + h / 2),    k3 = f(y + h k2 / 2, u_t + h / 2),    k4 = f(y + h k3, u_s)
    y_s = y_t + h (k1 + 2 k2 + 2 k3 + k4) / 6
"""

import dataclasses
from typing import Any

import jax

from diffusion.core.types import Array, Denoiser, Schedule
from diffusion.sampling.ode.first_order import CoordinateName, OneStep, coordinate, first_order


@dataclasses.dataclass(frozen=True)
class RK4(OneStep):
    """A fourth-order method. The last step, to sigma = 0, is an Euler step."""

    coordinate: CoordinateName = None

    def evaluations(self, steps: int, to_data: bool = True) -> int:
        return 4 * steps - 3 * to_data

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        ode = coordinate(self.coordinate, schedule)
        denoised = denoise(x, t)

        def fourth_order() -> Array:
            def slope_after(slope: Array, time: Array) -> Array:
                """Returns the slope at the point that a constant slope reaches at `time`."""
                moved = ode.move(x, slope, t, time)
                return ode.slope(moved, denoise(moved, time).x0, time)

            middle = ode.time((ode.from_time(t) + ode.from_time(s)) / 2)
            k1 = ode.slope(x, denoised.x0, t)
            k2 = slope_after(k1, middle)
            k3 = slope_after(k2, middle)
            k4 = slope_after(k3, s)
            return ode.move(x, (k1 + 2 * k2 + 2 * k3 + k4) / 6, t, s)

        moved = jax.lax.cond(schedule.sigma(s) > 0, fourth_order, lambda: first_order(schedule, x, denoised, t, s))
        return moved, denoised.x0, state


def make(coordinate: CoordinateName = None) -> RK4:
    """Makes the Runge-Kutta sampler, with four evaluations per step and one in the last.

    Args:
      coordinate: the variables in which the ODE is solved: `noise_level` (x / alpha against sigma / alpha) or `time` (x
        against t). By default `time` for schedules that end in pure noise (flows), otherwise `noise_level`.
    """
    return RK4(coordinate)
