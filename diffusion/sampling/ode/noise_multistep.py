"""Multistep methods on eps whose weights do not depend on the grid: `ipndm` and `gradient_estimation`."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion.core.types import Array, Denoiser, Schedule
from diffusion.sampling.ode.first_order import Solver, eps_of, first_order, x0_of_eps
from diffusion.sampling.ode.multistep import History, weighted_differences


@dataclasses.dataclass(frozen=True)
class NoiseMultistep(Solver):
    """Takes the first-order step with e' = sum_k w_k e_k in place of e_0, the newest of the last values of eps:

        x_s = (alpha_s / alpha_t) x_t + (sigma_s - sigma_t alpha_s / alpha_t) e'

    Attributes:
      weights: the weights, each row of sum 1, with one known value, two, and so on; the last row for all later steps.
      first_order_final: whether a step to the data takes e_0.
    """

    weights: tuple[tuple[float, ...], ...]
    first_order_final: bool = False
    uses_separate_eps = True

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        return {"history": History.empty(len(self.weights), x, times)}

    def step(
        self, x: Array, state: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, dict]:
        denoised = denoise(x, t)
        history = state["history"].push(eps_of(schedule, x, x0_of_eps(denoised), t).astype(x.dtype), t)
        table = np.array([[*row, *[0.0] * (len(self.weights) - len(row))] for row in self.weights])
        weights = jnp.asarray(table, t.dtype)[jnp.minimum(history.count, len(table)) - 1]
        alpha_t, alpha_s = schedule.alpha(t), schedule.alpha(s)
        # A step from pure noise is infinite in sigma / alpha, and of first order.
        regular = (alpha_t > 0) & ((s > 0) | (not self.first_order_final))
        scale = schedule.sigma(s) - schedule.sigma(t) * alpha_s / jnp.where(regular, alpha_t, 1)
        change = jnp.where(regular, scale, 0) * weighted_differences(history.values, weights)
        return (first_order(schedule, x, denoised, t, s) + change).astype(x.dtype), denoised.x0, {"history": history}
