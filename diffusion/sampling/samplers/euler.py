"""Euler's method."""

import dataclasses

from diffusion.core.types import Array, Denoiser, Schedule
from diffusion.sampling.ode.first_order import CoordinateName, OneStep, coordinate, first_order


@dataclasses.dataclass(frozen=True)
class Euler(OneStep):
    coordinate: CoordinateName = None

    @property
    def uses_separate_eps(self) -> bool:
        return self.coordinate != "time"

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        denoised = denoise(x, t)
        if self.coordinate != "time":
            return first_order(schedule, x, denoised, t, s)
        path = coordinate(self.coordinate, schedule)
        return path.move(x, path.slope(x, denoised.x0, t), t, s)


def make(coordinate: CoordinateName = None) -> Euler:
    """Args: `coordinate`, what the ODE is read in: `noise_level` (x / alpha against sigma / alpha), in which Euler is
    DDIM, or `time` (x against t). The two are one on the straight path of flow matching. Default: `noise_level`."""
    return Euler(coordinate)
