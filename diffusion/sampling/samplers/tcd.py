"""Strategic stochastic sampling of trajectory consistency distillation (Zheng et al. 2024, arXiv 2402.19159, alg. 4).

A step overshoots to the time r between s and the data, and returns to s with fresh noise:

    r   = (1 - gamma) s
    x_r = alpha_r x0 + sigma_r eps,    eps = (x_t - alpha_t x0) / sigma_t
    x_s ~ q(x_s | x_r), the forward process

The model is evaluated at x_t, for a flow map with the target time r. gamma = 0 is deterministic, and gamma = 1 is
`lcm`. If the schedule is a table, r is rounded down to a point of it.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.loop import renoised
from diffusion.sampling.ode.first_order import OneStep, first_order


@dataclasses.dataclass(frozen=True)
class TCD(OneStep):
    """Jumps below the time s and adds noise up to it."""

    gamma: float = 0.3
    few_step = True

    @property
    def stochastic(self) -> bool:
        return self.gamma > 0

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        r = (1 - self.gamma) * s
        points = getattr(schedule, "num_steps", None)
        if points is not None:  # point i of the table is at (i + 1) / points
            index = jnp.floor((1 - self.gamma) * (points * s - 1) + 1e-4)
            r = jnp.clip((index + 1) / points, 0, s)
            r = jnp.where(s - r < 0.5 / points, s, r)  # without a rounding error, which would become noise
        denoised = denoise(x, t, target_time=jnp.broadcast_to(r, x.shape[:1]))
        if denoised.kind not in ("consistency", "flow_map"):
            raise InputError("sampler.name", "requires a consistency model or a flow map, but this one predicts the "
                             "mean of x0; use ddim")  # fmt: skip
        moved = first_order(schedule, x, denoised, t, r).astype(x.dtype)
        return renoised(schedule, moved, r, s, keys), denoised.x0, state


def make(gamma: float = 0.3) -> TCD:
    """Makes the sampler of TCD, with one evaluation per step.

    Args:
      gamma: the amount of fresh noise, in [0, 1]; the authors use 0.2 for 4 steps and up to 0.5 for more.
    """
    if not 0 <= gamma <= 1:
        raise InputError("gamma", f"must be in [0, 1], got {gamma}")
    return TCD(gamma)
