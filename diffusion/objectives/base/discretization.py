"""Which two times a consistency model in discrete time is held equal at, and how that changes over training, by name.

Each is a pure function of the step, so a run that goes on has what it would have had.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.types import Array, InputError, Schedule
from diffusion.sampling.ode.first_order import coordinate

HIGHEST = 80.0  # the level sigma / alpha that a grid has last before pure noise


@dataclasses.dataclass(frozen=True)
class Discretization:
    """See the functions below.

    Attributes:
      pair: `(schedule, t, t_min, step) -> (t, r)`: from times t `[B]`, those where the student is trained and the
        earlier ones that it is held to, `t_min <= r < t`.
      decay: `step -> []`: of the target network's average of the student.
      metrics: `step -> {name: []}`.
    """

    pair: Callable[[Schedule, Array, float, Array], tuple[Array, Array]]
    decay: Callable[[Array], Array]
    metrics: Callable[[Array], dict[str, Array]]


def fixed(points: int = 18, rho: float = 7.0, decay: float = 0.95) -> Discretization:
    """The grid of consistency distillation (Song et al. 2023, arXiv 2303.01469, algorithm 2): N points whose levels are
    even in their power 1 / rho. A drawn t goes up to the next point.

    Args:
      points: N.
      decay: mu, of the target network.
    """
    _check(points=points)
    return _on_grid(lambda step: jnp.int32(points), lambda step: jnp.float32(decay), rho)


def square_root(steps: int, start: int = 2, end: int = 150, rho: float = 7.0, decay: float = 0.95) -> Discretization:
    """Consistency training's: the squares of the numbers of points rise evenly from `start` to `end`, and the decay of
    the target rises with them (Song et al. 2023, appendix C).

    Args:
      steps: K, over which they rise.
      start, end: s0 and s1.
      decay: mu0.
    """
    _check(steps=steps, start=start)
    if end < start:
        raise InputError("end", f"must be at least start = {start}, got {end}")

    def points(step: Array) -> Array:
        share = jnp.minimum(step, steps) / steps
        return (jnp.ceil(jnp.sqrt(share * ((end + 1) ** 2 - start**2) + start**2) - 1) + 1).astype(jnp.int32)

    return _on_grid(points, lambda step: jnp.exp(start * math.log(decay) / points(step)), rho)


def doubling(steps: int, start: int = 10, end: int = 1280, rho: float = 7.0) -> Discretization:
    """Improved consistency training's: the number of steps of the grid doubles from `start` to `end`, each for as long
    as the others (Song & Dhariwal 2023, arXiv 2310.14189, section 3.4). Its target is the student itself.

    Args:
      steps: K, of the whole.
      start, end: s0 and s1.
    """
    _check(steps=steps, start=start)
    if end < start:
        raise InputError("end", f"must be at least start = {start}, got {end}")
    each = max(math.floor(steps / (math.log2(end // start) + 1)), 1)

    def points(step: Array) -> Array:
        doublings = jnp.minimum(step // each, 30)
        return jnp.minimum(start * 2.0**doublings, end).astype(jnp.int32) + 1

    return _on_grid(points, lambda step: jnp.float32(0), rho)


def ratio(every: int, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Discretization:
    """Easy consistency tuning's (Geng et al. 2024, arXiv 2406.14548, section 3.2): r / t = 1 - n(t) / q^a with
    n(t) = 1 + k sigmoid(-b t), where a is 1 and rises by one `every` so many steps, so r comes near t. At first r is
    mostly 0, which is the training of a diffusion model. t and r are levels sigma / alpha, or times where the schedule
    ends in pure noise. Its target is the student itself.

    Args:
      q: above 1.
      k, b: by how much, and below which t, r is further away; at least 0.
    """
    _check(every=every)
    if q <= 1:
        raise InputError("q", f"must be above 1, got {q}")
    for name, value in (("k", k), ("b", b)):
        if value < 0:
            raise InputError(name, f"must be at least 0, got {value}")

    def stage(step: Array) -> Array:
        return q ** (1.0 + step // every)

    def pair(schedule: Schedule, t: Array, t_min: float, step: Array) -> tuple[Array, Array]:
        path, t = coordinate(None, schedule), jnp.maximum(t, np.nextafter(np.float32(t_min), np.float32(1)))
        u = path.at(t)
        r = path.time(u * jnp.maximum(1 - (1 + k * jax.nn.sigmoid(-b * u)) / stage(step), 0))
        # A level that float32 cannot tell from t would be a step of nothing.
        r = jnp.minimum(r, jnp.nextafter(t, jnp.zeros_like(t)))
        return t, jnp.maximum(r, t_min)

    return Discretization(pair, lambda step: jnp.float32(0), lambda step: {"gap": 1 / stage(step)})


def _on_grid(points: Callable[[Array], Array], decay: Callable[[Array], Array], rho: float) -> Discretization:
    """Neighbours on the grid of `points(step)` levels, from that of t_min to the schedule's highest."""
    if rho <= 0:
        raise InputError("rho", f"must be positive, got {rho}")

    def pair(schedule: Schedule, t: Array, t_min: float, step: Array) -> tuple[Array, Array]:
        def root(t: Array) -> Array:
            """Of the level, `(sigma / alpha)^(1 / rho)`."""
            return jnp.exp(-schedule.log_snr(t) / (2 * rho))

        low, high = root(jnp.float32(t_min)), jnp.minimum(root(jnp.float32(1)), HIGHEST ** (1 / rho))
        cells = points(step) - 1
        share = jnp.clip((root(t) - low) / (high - low), 0, 1)
        index = jnp.clip(jnp.ceil(share * cells).astype(jnp.int32), 1, cells)

        def at(index: Array) -> Array:
            inner = schedule.time(-2 * rho * jnp.log(low + index / cells * (high - low)))
            return jnp.where(index == 0, t_min, jnp.where(index == cells, 1, jnp.clip(inner, t_min, 1)))

        return at(index), at(index - 1)

    return Discretization(pair, decay, lambda step: {"points": points(step), "target_decay": decay(step)})


def _check(**numbers: int) -> None:
    for name, value in numbers.items():
        least = 2 if name == "points" else 1
        if value < least:
            raise InputError(name, f"must be at least {least}, got {value}")
