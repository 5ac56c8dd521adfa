"""How straight the paths of a learned flow are."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion.core.arrays import derivative
from diffusion.core.types import Array, Denoiser, InputError, Schedule, Source


@dataclasses.dataclass(frozen=True)
class Straightness:
    """See `make`. A `ModelMetric`."""

    shape: tuple[int, ...]
    num: int
    steps: int

    def __call__(self, denoise: Denoiser, schedule: Schedule, key: Array) -> dict[str, float]:
        @jax.jit
        def measure(key: Array) -> Array:
            start = schedule.sigma(jnp.float32(1)) * jax.random.normal(key, (self.num, *self.shape))

            def step(x: Array, t: Array) -> tuple[Array, Array]:
                x0 = denoise(x, t, {}).x0
                eps = (x - schedule.alpha(t) * x0) / schedule.sigma(t)
                velocity = derivative(schedule.alpha, t) * x0 + derivative(schedule.sigma, t) * eps
                return x - velocity / self.steps, velocity

            times = jnp.arange(self.steps, 0, -1) / self.steps
            end, velocities = jax.lax.scan(step, start, times)
            bend = jnp.sum(jnp.square(velocities - (start - end)).reshape(self.steps, self.num, -1), axis=-1)
            return jnp.mean(bend)

        return {"path_curvature": float(measure(key))}


def make(train: Source, held_out: Source, num: int = 2000, steps: int = 200) -> Straightness:
    """The mean over paths and times of |dx/dt - (x_1 - x_0)|^2: 0 for straight paths at constant speed, which one Euler
    step follows to the end (Liu et al. 2023, arXiv 2209.03003, eq. 6).

    Args:
      num: paths, each from its own noise.
      steps: Euler steps along them.
    """
    for name, value in (("num", num), ("steps", steps)):
        if value < 1:
            raise InputError(name, f"must be at least 1, got {value}")
    if train.spec.num_classes:
        raise InputError("name", "straightness is of unconditional flows; the data has classes")
    return Straightness(train.spec.shape, num, steps)
