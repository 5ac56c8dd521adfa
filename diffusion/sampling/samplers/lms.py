"""Linear multistep: Adams-Bashforth on uneven steps (k-diffusion's `lms`; its weights here are exact integrals)."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffusion.core.arrays import expand
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import CoordinateName, Solver, coordinate
from diffusion.sampling.ode.multistep import History, check_steps, integrals


@dataclasses.dataclass(frozen=True)
class LMS(Solver):
    """The slope is taken for the polynomial through the last `order` of them."""

    order: int = 4
    coordinate: CoordinateName = None

    def init(self, x: Array, times: Array) -> dict[str, Any]:
        check_steps(times, self.order)
        return {"x": x, "history": History.empty(self.order, x, times), "index": jnp.int32(0)}

    def step(self, carry: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> dict:
        x, path = carry["x"], coordinate(self.coordinate, schedule)
        u, end = path.at(t), path.at(s)
        history = carry["history"].push(path.slope(x, denoise(x, t).x0, t), u)
        valid = jnp.arange(self.order) <= carry["index"]
        weights = integrals((history.nodes - u) / (end - u), valid, jnp.ones_like)
        slope = jnp.sum(expand(weights, history.values) * history.values, axis=0)
        return {"x": path.move(x, slope, t, s), "history": history, "index": carry["index"] + 1}


def make(order: int = 4, coordinate: CoordinateName = None) -> LMS:
    """One evaluation a step.

    Args:
      order: 1 (Euler) to 4.
      coordinate: what the ODE is read in: `noise_level` (x / alpha against sigma / alpha) or `time` (x against t).
        Default: `time` where the schedule ends in pure noise (flows), else `noise_level`.
    """
    if not 1 <= order <= 4:
        raise InputError("order", f"must be 1, 2, 3 or 4, got {order}")
    return LMS(order, coordinate)
