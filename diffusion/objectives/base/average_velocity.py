"""The base of flow-map objectives, whose network predicts the average velocity of the ODE between two times,

    u(x_t, t, r) = (x_t - x_r) / (t - r),   which for r = t is the instantaneous velocity dx/dt,

so that a step of any length takes one evaluation. The network is conditioned on the noise label of t and, as
`step_size`, on the noise label of t minus that of r.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core.arrays import derivative, expand, per_example
from diffusion.core.types import (
    SCALAR_CONDITIONS,
    Apply,
    Array,
    Cond,
    Denoised,
    Denoiser,
    InputError,
    Params,
    Schedule,
)
from diffusion.objectives.base.gaussian import Gaussian, ScheduleSpec, TimeSamplerSpec, build_parts


@dataclasses.dataclass(frozen=True)
class AverageVelocity(Gaussian):
    """The base of objectives that train such a network, with the parameterization `velocity`.

    The first examples of a batch are trained on steps, r < t, and all others on the velocity, r = t.
    """

    @property
    def scalar_conditions(self) -> tuple[str, ...]:
        return ("step_size",)

    def shuffled_times(self, key: Array, n: int, objective_state: Mapping[str, Array]) -> tuple[Array, Array]:
        """Returns t and its importance weight, both `[n]`, in random order.

        A time sampler may return sorted times, while the first examples of a batch are trained differently from the
        rest.
        """
        key_t, key_order = jax.random.split(key)
        t, weight = self.time_sampler.draw(self.schedule, key_t, n, objective_state)
        order = jax.random.permutation(key_order, n)
        return t[order], weight[order]

    def average_velocity(
        self, net: Apply, params: Params, x: Array, t: Array, r: Array, cond: Cond, key: Array | None = None
    ) -> Array:
        """Returns u `[B, ...]` at times t and r `[B]`; `params` are those of the network alone."""
        at_t, at_r = self.parameterization(self.schedule, t), self.parameterization(self.schedule, r)
        cond = {**cond, "step_size": at_t.c_noise - at_r.c_noise}
        return net(params, expand(at_t.c_in, x) * x, at_t.c_noise, cond, key=key)

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        """Returns a denoiser that accepts a target time `cond["target_time"] [B]`.

        With a target time r, x0 is the one for which `ode.first_order` moves from t to the point at r that u
        predicts. Without it, x0 is the posterior mean that corresponds to the velocity u(x, t, t).
        """

        def denoise(x: Array, t: Array, cond: Cond) -> Denoised:
            t = per_example(t, x)
            r = cond.get("target_time", t)
            u = self.average_velocity(net, params["net"], x, t, r, cond)
            kind = "flow_map" if "target_time" in cond else "posterior_mean"
            return Denoised(straight_x0(self.schedule, x, u, t, r), kind=kind)

        return denoise


def straight_x0(schedule: Schedule, x: Array, u: Array, t: Array, r: Array) -> Array:
    """Returns the x0 for which a first-order step from x at t arrives at x - (t - r) u at r, for times `[B]`.

    It uses the coefficients of the velocity parameterization with alpha' and sigma' averaged over the step instead of
    evaluated at t; both agree for r = t.
    """

    def slope(of: Callable[[Array], Array]) -> Array:
        length = t - r
        return jnp.where(length == 0, derivative(of, t), (of(t) - of(r)) / jnp.where(length == 0, 1, length))

    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    d_alpha, d_sigma = slope(schedule.alpha), slope(schedule.sigma)
    determinant = alpha * d_sigma - sigma * d_alpha
    return expand(d_sigma / determinant, x) * x - expand(sigma / determinant, x) * u


def num_step_examples(share: float, n: int) -> int:
    """Returns how many of n examples are trained on steps; these are the first ones."""
    return round(share * n)


def max_step_examples(share: float, n: int) -> int:
    """Returns a static upper bound on the number of step examples in a micro-batch of n.

    It holds for every micro-batch, because micro-batches take every k-th example of the batch.
    """
    return math.ceil(share * n - 1e-6)


def drop_condition(cond: Cond) -> Cond:
    """Returns the condition with `keep` set to False everywhere, for guidance during training.

    Raises:
      InputError: There is no condition to drop.
    """
    if not cond.keys() - {"keep", "target_time", *SCALAR_CONDITIONS}:
        raise InputError("objective.guidance", "must be 1, because the data has no conditions to guide by")
    return {**cond, "keep": jnp.zeros(jax.tree.leaves(cond)[0].shape[:1], bool)}


def velocity_parts(schedule: ScheduleSpec, c_noise: str, time_sampler: TimeSamplerSpec) -> dict[str, Any]:
    """Builds the parts of an `AverageVelocity`.

    Raises:
      InputError: The velocity of the path is not finite at one of its ends.
    """
    parts = build_parts(schedule, {"name": "velocity", "c_noise": c_noise}, time_sampler, "simple")
    for t in (0.0, 1.0):
        for of in (parts["schedule"].alpha, parts["schedule"].sigma):
            if not jnp.isfinite(derivative(of, jnp.float32(t))):
                raise InputError("schedule", f"{schedule!r} has no finite velocity at t = {t:g}; use flow, trig or vp")
    return parts
