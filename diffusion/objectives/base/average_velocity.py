"""What flow maps share: a network that gives the average velocity of the ODE's path between two time_sampler,

    u(x_t, t, r) = (x_t - x_r) / (t - r),   and at r = t the velocity dx/dt itself,

so that a step of any length takes one evaluation. It is told the noise label of t and, as `r`, how much less that of r
is: the length of the step.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core.arrays import derivative, expand
from diffusion.core.types import Apply, Array, Cond, Denoised, Denoiser, InputError, Params, Schedule
from diffusion.objectives.base.gaussian import Gaussian, PartSpec, build_parts


@dataclasses.dataclass(frozen=True)
class AverageVelocity(Gaussian):
    """The base of objectives that train such a network: on steps, r < t, the first of a batch's examples, and on the
    velocity, r = t, all the others. The parameterization is `velocity`."""

    @property
    def scalar_conditions(self) -> tuple[str, ...]:
        return ("step_size",)

    def shuffled_times(self, key: Array, n: int, objective_state: Mapping[str, Array]) -> tuple[Array, Array]:
        """t and its weight, both `[n]`, in random order: a law may give them in a row, and the first of a batch are
        trained on other things than the rest."""
        key_law, key_order = jax.random.split(key)
        t, weight = self.time_sampler.draw(self.schedule, key_law, n, objective_state)
        order = jax.random.permutation(key_order, n)
        return t[order], weight[order]

    def average_velocity(
        self, net: Apply, params: Params, x: Array, t: Array, r: Array, cond: Cond, key: Array | None = None
    ) -> Array:
        """u, `[B, ...]`, at times t and r `[B]`; `params` are the network's own."""
        here, there = self.parameterization(self.schedule, t), self.parameterization(self.schedule, r)
        told = {**cond, "step_size": here.c_noise - there.c_noise}
        return net(params, expand(here.c_in, x) * x, here.c_noise, told, key=key)

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        """With the time `cond["target_time"] [B]`, the x0 by which `solver.first_order` goes to where u does; without, the mean
        of x0 by the velocity u(x, t, t)."""

        def denoise(x: Array, t: Array, cond: Cond) -> Denoised:
            t = jnp.broadcast_to(t, x.shape[:1])
            r = cond.get("target_time", t)
            u = self.average_velocity(net, params["net"], x, t, r, cond)
            return Denoised(
                straight_x0(self.schedule, x, u, t, r), kind="flow_map" if "target_time" in cond else "mean"
            )

        return denoise


def straight_x0(schedule: Schedule, x: Array, u: Array, t: Array, r: Array) -> Array:
    """The x0 whose straight step from x at t leads to x - (t - r) u at r, times `[B]`. It is that of the velocity's row
    with the means of alpha' and sigma' over the step in place of their values at t, which they are at r = t."""

    def slope(of: Callable[[Array], Array]) -> Array:
        length = t - r
        return jnp.where(length == 0, derivative(of, t), (of(t) - of(r)) / jnp.where(length == 0, 1, length))

    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    d_alpha, d_sigma = slope(schedule.alpha), slope(schedule.sigma)
    determinant = alpha * d_sigma - sigma * d_alpha
    return expand(d_sigma / determinant, x) * x - expand(sigma / determinant, x) * u


def num_step_examples(share: float, n: int) -> int:
    """How many of n examples, the first of them, are trained on steps."""
    return round(share * n)


def max_step_examples(share: float, n: int) -> int:
    """At least as many as `count` of the n examples in a micro-batch, whatever part of the batch it is: micro-batches
    take the examples in turn."""
    return math.ceil(share * n - 1e-6)


def drop_condition(cond: Cond) -> Cond:
    """The condition dropped, for guidance in training.

    Raises:
      InputError: there is none.
    """
    if not cond.keys() - {"keep", "target_time", "step_size", "guidance_scale"}:
        raise InputError("objective.guidance", "the data has no classes to guide by; use 1")
    return {**cond, "keep": jnp.zeros(next(iter(cond.values())).shape[:1], bool)}


def velocity_parts(schedule: PartSpec, c_noise: str, time_sampler: PartSpec) -> dict[str, Any]:
    """The parts of a `AverageVelocity`.

    Raises:
      InputError: the path has no finite velocity at one of its ends.
    """
    parts = build_parts(schedule, {"name": "velocity", "c_noise": c_noise}, time_sampler, "simple")
    for t in (0.0, 1.0):
        for of in (parts["schedule"].alpha, parts["schedule"].sigma):
            if not jnp.isfinite(derivative(of, jnp.float32(t))):
                raise InputError("schedule", f"{schedule!r} has no finite velocity at t = {t:g}; use flow, trig or vp")
    return parts
