"""Discretizations of time for consistency models in discrete time, by name.

A discretization gives the two times t and r < t at which the model is trained to agree, and how they change during
training. It is a pure function of the step, so a resumed run continues exactly as the uninterrupted one.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks
from diffusion.core.types import Array, InputError, Schedule
from diffusion.sampling.ode.first_order import coordinate

HIGHEST = 80.0  # the largest noise level sigma / alpha of a grid, if the schedule ends in pure noise


@dataclasses.dataclass(frozen=True)
class Discretization:
    """A discretization of time; the functions below build it.

    Attributes:
      pair: `(schedule, t, t_min, step) -> (t, r)`. Maps times t `[B]` to the times at which the student is trained and
        the earlier times that it is matched to, `t_min <= r < t`.
      decay: `step -> []`. The EMA decay of the target network.
      metrics: `step -> {name: []}`.
    """

    pair: Callable[[Schedule, Array, float, Array], tuple[Array, Array]]
    decay: Callable[[Array], Array]
    metrics: Callable[[Array], dict[str, Array]]


def fixed(points: int = 18, rho: float = 7.0, decay: float = 0.95) -> Discretization:
    """Returns the grid of consistency distillation (Song et al. 2023, arXiv 2303.01469, algorithm 2).

    The noise levels of its points are evenly spaced in their power 1 / rho. A drawn t is rounded up to the next point.

    Args:
      points: The number of points N.
      decay: The EMA decay mu of the target network.
    """
    checks.at_least(2, points=points)
    return _on_grid(lambda step: jnp.int32(points), lambda step: jnp.float32(decay), rho)


def square_root(steps: int, start: int = 2, end: int = 150, rho: float = 7.0, decay: float = 0.95) -> Discretization:
    """Returns the schedule of consistency training (Song et al. 2023, appendix C).

    The squared number of points grows linearly from `start` to `end`, and the decay of the target grows with it.

    Args:
      steps: The number of training steps K over which the grid grows.
      start, end: The numbers of points s0 and s1.
      decay: mu0, the decay at the start.
    """
    checks.at_least(1, steps=steps, start=start)
    _check_end(start, end)

    def points(step: Array) -> Array:
        share = jnp.minimum(step, steps) / steps
        return (jnp.ceil(jnp.sqrt(share * ((end + 1) ** 2 - start**2) + start**2) - 1) + 1).astype(jnp.int32)

    return _on_grid(points, lambda step: jnp.exp(start * math.log(decay) / points(step)), rho)


def doubling(steps: int, start: int = 10, end: int = 1280, rho: float = 7.0) -> Discretization:
    """Returns the schedule of improved consistency training (Song & Dhariwal 2023, arXiv 2310.14189, section 3.4).

    The number of grid intervals doubles from `start` to `end` after equal numbers of steps. The target is the student.

    Args:
      steps: The total number of training steps K.
      start, end: The numbers of intervals s0 and s1.
    """
    checks.at_least(1, steps=steps, start=start)
    _check_end(start, end)
    stage_steps = max(math.floor(steps / (math.log2(end // start) + 1)), 1)

    def points(step: Array) -> Array:
        doublings = jnp.minimum(step // stage_steps, 30)
        return jnp.minimum(start * 2.0**doublings, end).astype(jnp.int32) + 1

    return _on_grid(points, lambda step: jnp.float32(0), rho)


def ratio(every: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Discretization:
    """Returns the schedule of easy consistency tuning (Geng et al. 2024, arXiv 2406.14548, section 3.2).

    r / t = 1 - n(t) / q^a with n(t) = 1 + k sigmoid(-b t). The exponent a starts at 1 and increases by one every
    `every` steps, so that r approaches t. Initially r is 0 for most t, which is the training of a diffusion model. Here
    t and r are noise levels sigma / alpha, or times if the schedule ends in pure noise. The target is the student.

    Args:
      every: The number of training steps between increments of a.
      q: The base, above 1.
      k, b: The size and the inverse range of the additional distance at small t; at least 0.
    """
    checks.at_least(1, every=every)
    if q <= 1:
        raise InputError("q", f"must be above 1, got {q}")
    checks.at_least(0, k=k, b=b)

    def stage(step: Array) -> Array:
        return q ** (1.0 + step // every)

    def pair(schedule: Schedule, t: Array, t_min: float, step: Array) -> tuple[Array, Array]:
        path, t = coordinate(None, schedule), jnp.maximum(t, np.nextafter(np.float32(t_min), np.float32(1)))
        u = path.from_time(t)
        r = path.time(u * jnp.maximum(1 - (1 + k * jax.nn.sigmoid(-b * u)) / stage(step), 0))
        # Without this, rounding to float32 could give r = t.
        r = jnp.minimum(r, jnp.nextafter(t, jnp.zeros_like(t)))
        return t, jnp.maximum(r, t_min)

    return Discretization(pair, lambda step: jnp.float32(0), lambda step: {"gap": 1 / stage(step)})


def _on_grid(points: Callable[[Array], Array], decay: Callable[[Array], Array], rho: float) -> Discretization:
    """Returns neighbouring points of a grid of `points(step)` noise levels, from that of t_min to the highest."""
    checks.positive(rho=rho)

    def pair(schedule: Schedule, t: Array, t_min: float, step: Array) -> tuple[Array, Array]:
        def root(t: Array) -> Array:
            """Returns (sigma / alpha)^(1 / rho)."""
            return jnp.exp(-schedule.log_snr(t) / (2 * rho))

        low, high = root(jnp.float32(t_min)), jnp.minimum(root(jnp.float32(1)), HIGHEST ** (1 / rho))
        cells = points(step) - 1
        share = jnp.clip((root(t) - low) / (high - low), 0, 1)
        index = jnp.clip(jnp.ceil(share * cells).astype(jnp.int32), 1, cells)

        def time_at(index: Array) -> Array:
            inner = schedule.time(-2 * rho * jnp.log(low + index / cells * (high - low)))
            return jnp.where(index == 0, t_min, jnp.where(index == cells, 1, jnp.clip(inner, t_min, 1)))

        return time_at(index), time_at(index - 1)

    return Discretization(pair, decay, lambda step: {"points": points(step), "target_decay": decay(step)})


def _check_end(start: int, end: int) -> None:
    if end < start:
        raise InputError("end", f"must be at least start = {start}, got {end}")
