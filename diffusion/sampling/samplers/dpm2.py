"""The midpoint method with the midpoint in log(sigma): k-diffusion's `dpm_2`, DPM-Solver-2's relative in the
coordinates of Karras et al. 2022 (arXiv 2206.00364, algorithm 2 of appendix D)."""

import dataclasses

import jax

from diffusion.core.types import Array, Denoiser, Schedule
from diffusion.sampling.ode.first_order import CoordinateName, OneStep, coordinate, first_order


@dataclasses.dataclass(frozen=True)
class DPM2(OneStep):
    """Second order. The last step, to sigma = 0, is Euler's."""

    coordinate: CoordinateName = None

    def evaluations(self, steps: int) -> int:
        return 2 * steps - 1

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        path = coordinate(self.coordinate, schedule)
        denoised = denoise(x, t)

        def second_order() -> Array:
            middle = path.middle(t, s)
            half_way = path.move(x, path.slope(x, denoised.x0, t), t, middle)
            return path.move(x, path.slope(half_way, denoise(half_way, middle).x0, middle), t, s)

        return jax.lax.cond(schedule.sigma(s) > 0, second_order, lambda: first_order(schedule, x, denoised, t, s))


def make(coordinate: CoordinateName = None) -> DPM2:
    """Two evaluations a step, one in the last.

    Args:
      coordinate: what the ODE is read in: `noise_level` (x / alpha against sigma / alpha) or `time` (x against t,
        with the midpoint in t). Default: `time` where the schedule ends in pure noise (flows), else `noise_level`.
    """
    return DPM2(coordinate)
