"""The straightness of the ODE trajectories of a learned flow."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import derivative
from diffusion.core.types import Array, InputError, Model, Params, Source


@dataclasses.dataclass(frozen=True)
class Straightness:
    """A `ModelMetric`; see `make`."""

    shape: tuple[int, ...]
    num: int
    steps: int
    kind = "model"
    names = ("path_curvature",)

    def __call__(self, model: Model, params: Params, key: Array) -> dict[str, float]:
        return {"path_curvature": float(self._measure(model, params, key))}

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _measure(self, model: Model, params: Params, key: Array) -> Array:
        denoise, schedule = model(params)
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


def make(train: Source, held_out: Source, num: int = 2000, steps: int = 200) -> Straightness:
    """Builds the metric: the mean of |dx/dt - (x_1 - x_0)|^2 over trajectories and times.

    It is 0 for straight trajectories at constant speed, which a single Euler step solves exactly (Liu et al. 2023,
    arXiv 2209.03003, eq. 6).

    Args:
      num: Number of trajectories, each from independent noise.
      steps: Number of Euler steps per trajectory.
    """
    checks.at_least(1, num=num, steps=steps)
    if train.spec.conditions:
        raise InputError("name", "straightness requires an unconditional flow, but the data has conditions")
    return Straightness(train.spec.shape, num, steps)
