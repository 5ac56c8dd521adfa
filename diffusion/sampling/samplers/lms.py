"""Linear multistep: Adams-Bashforth on uneven steps (k-diffusion's `lms`, whose weights are exact integrals here).

With y = x / alpha, u = sigma / alpha, eps_k the last `order` evaluations and l_k the Lagrange basis through their u_k:

    y_s = y_t + sum_k eps_k  integral from u_t to u_s of l_k(u) du
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffusion.core.arrays import expand
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import CoordinateName, Solver, coordinate
from diffusion.sampling.ode.multistep import History, quadrature_weights


@dataclasses.dataclass(frozen=True)
class LMS(Solver):
    """Interpolates the last `order` slopes; the first steps have lower orders."""

    order: int = 4
    coordinate: CoordinateName = None

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        return {"history": History.empty(self.order, x, times)}

    def step(
        self, x: Array, state: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, dict]:
        ode, x0 = coordinate(self.coordinate, schedule), denoise(x, t).x0
        u, end = ode.from_time(t), ode.from_time(s)
        history = state["history"].push(ode.slope(x, x0, t), u)
        valid = jnp.arange(self.order) < history.count
        step = jnp.where(end == u, 1, end - u)  # a step of length 0 leaves x
        weights = quadrature_weights((history.nodes - u) / step, valid, jnp.ones_like)
        slope = jnp.sum(expand(weights, history.values) * history.values, axis=0)
        return ode.move(x, slope, t, s), x0, {"history": history}


def make(order: int = 4, coordinate: CoordinateName = None) -> LMS:
    """Makes the linear multistep sampler, with one evaluation per step.

    Args:
      order: from 1 (Euler) to 4.
      coordinate: the variables in which the ODE is solved: `noise_level` (x / alpha against sigma / alpha) or `time` (x
        against t). By default `time` for schedules that end in pure noise (flows), otherwise `noise_level`.
    """
    if not 1 <= order <= 4:
        raise InputError("order", f"must be 1, 2, 3 or 4, got {order}")
    return LMS(order, coordinate)
