"""MeanFlow: the average velocity u(z_t, t, r), learned from the identity that relates it to the velocity v,

    u = v - (t - r) du/dt,   d/dt along the path for fixed r

(Geng et al. 2025, arXiv 2505.13447, eq. 6), and its improved form, in which the target depends on the example only
through the noised z_t (Geng et al. 2025, arXiv 2512.02012).
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import expand, kept
from diffusion.core.types import Apply, Array, Batch, Cond, InputError, Params
from diffusion.layers.attention import jvp
from diffusion.objectives.base.average_velocity import (
    AverageVelocity,
    drop_condition,
    max_step_examples,
    num_step_examples,
    velocity_parts,
)
from diffusion.objectives.base.gaussian import ScheduleSpec, TimeSamplerSpec, corrupt

TIME_SAMPLER = {"name": "logit_normal", "mean": -0.4, "std": 1.0}  # the paper's, for ImageNet


@dataclasses.dataclass(frozen=True)
class MeanFlow(AverageVelocity):
    """MeanFlow; see `make`."""

    ratio_r_neq_t: float = 0.25
    norm_p: float = 1.0
    norm_eps: float = 1e-3
    guidance: float | tuple[float, float] = 1.0
    kappa: float = 0.0
    interval: tuple[float, float] = (0.0, 1.0)
    tangent: Literal["conditional", "predicted"] = "conditional"

    @property
    def scalar_conditions(self) -> tuple[str, ...]:
        return ("step_size", "guidance_scale") if isinstance(self.guidance, tuple) else ("step_size",)

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        """Draws `t`, `r`, `weight` and, if `guidance` is a range, `guidance`, all `[B]`, and `eps [B, ...]`."""
        x = batch["x"]
        key_t, key_r, key_eps, key_guidance = jax.random.split(key, 4)
        (t, weight_t), (r, weight_r) = (self.shuffled_times(k, len(x), objective_state) for k in (key_t, key_r))
        # t is the larger of two draws for all examples, so that its distribution is the same with and without a step.
        t, r = jnp.maximum(t, r), jnp.minimum(t, r)
        draws = {
            "t": t,
            "r": jnp.where(jnp.arange(len(x)) < num_step_examples(self.ratio_r_neq_t, len(x)), r, t),
            "weight": weight_t * weight_r,
            "eps": jax.random.normal(key_eps, x.shape, x.dtype),
        }
        if isinstance(self.guidance, tuple):
            low, high = self.guidance
            draws["guidance"] = jax.random.uniform(key_guidance, (len(x),), minval=low, maxval=high)
        return draws

    def average_velocity(
        self, net: Apply, params: Params, x: Array, t: Array, r: Array, cond: Cond, key: Array | None = None
    ) -> Array:
        if isinstance(self.guidance, tuple):
            cond = {"guidance_scale": jnp.ones(len(x)), **cond}
        return super().average_velocity(net, params, x, t, r, cond, key)

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        draws = batch["draws"]
        x0, t, r, eps, cond = batch["x"], draws["t"], draws["r"], draws["eps"], batch["cond"]
        if "guidance" in draws:
            cond = {**cond, "guidance_scale": draws["guidance"]}
        x_t, fixed = corrupt(self.schedule, x0, eps, t), jax.lax.stop_gradient(params["net"])
        target = self.parameterization(self.schedule, t).target(x0, eps)
        if self.guidance != 1 or self.kappa:
            target = self.guided_velocity(net, fixed, x_t, t, target, cond)

        # For r = t the derivative cancels, so it is evaluated for the step examples only.
        steps, outputs = max_step_examples(self.ratio_r_neq_t, len(t)), []
        first, rest = (jax.tree.map(lambda a, part=part: a[part], (x_t, t, r, cond))
                       for part in (slice(steps), slice(steps, None)))  # fmt: skip
        if steps:
            x, t, r, cond = first
            direction = target[:steps]
            if self.tangent == "predicted":
                direction = self.average_velocity(net, fixed, x, t, t, cond)
            output, slope = jvp(
                lambda x, t: self.average_velocity(net, params["net"], x, t, r, cond, key),
                (x, t), (direction, jnp.ones_like(t)),
            )  # fmt: skip
            outputs.append(output)
            target = target.at[:steps].add(-expand(t - r, slope) * slope)
        if steps < len(x0):
            key = None if key is None else jax.random.fold_in(key, 1)
            x, t, r, cond = rest
            outputs.append(self.average_velocity(net, params["net"], x, t, r, cond, key))
        difference = jnp.concatenate(outputs) - jax.lax.stop_gradient(target)
        error = jnp.sum(jnp.square(difference), axis=tuple(range(1, x0.ndim)))
        weight = jax.lax.stop_gradient((error + self.norm_eps) ** -self.norm_p)
        return draws["weight"] * weight * error, {"error": jnp.mean(jnp.square(difference))}

    def guided_velocity(self, net: Apply, fixed: Params, x: Array, t: Array, velocity: Array, cond: Cond) -> Array:
        """Returns the velocity of the guided flow where the condition is kept and t is in the interval, else
        `velocity`.

        The guided velocity is omega v + kappa u(z, t, t | c) + (1 - omega - kappa) u(z, t, t | none) with
        omega = (1 - kappa) guidance (Geng et al. 2025, appendix).
        """
        scale, (low, high) = jnp.asarray(cond.get("guidance_scale", self.guidance)), self.interval
        unconditional = self.average_velocity(net, fixed, x, t, t, drop_condition(cond))
        guided = unconditional + expand(scale, x) * (velocity - unconditional)
        if self.kappa:
            conditional = self.average_velocity(net, fixed, x, t, t, cond)
            guided = self.kappa * conditional + (1 - self.kappa) * guided
        return jnp.where(expand(kept(cond) & (t >= low) & (t <= high), x), guided, velocity)


def make(
    schedule: ScheduleSpec = "flow",
    c_noise: Literal["time", "unit"] = "unit",
    time_sampler: TimeSamplerSpec = TIME_SAMPLER,
    ratio_r_neq_t: float = 0.25,
    norm_p: float = 1.0,
    norm_eps: float = 1e-3,
    guidance: float | tuple[float, float] = 1.0,
    kappa: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    tangent: Literal["conditional", "predicted"] = "conditional",
) -> MeanFlow:
    """Builds MeanFlow, for a network with the scalar condition `step_size` and the sampler `flow_map`.

    Args:
      schedule: The path; its velocity must be finite at both ends.
      c_noise: The noise label: t and t - r themselves, or 1000 times these, which makes the derivative in t large.
      time_sampler: The distribution of two independent times, of which t is the larger.
      ratio_r_neq_t: The fraction of the batch with r < t, in [0, 1]; the rest, with r = t, is trained by flow matching.
      norm_p, norm_eps: p and c of the weight 1 / (error + c)^p of each example, whose error is summed over its entries;
        p = 0 gives the plain squared error.
      guidance: The classifier-free guidance scale of the learned flow, as in `guidance.cfg`, so that sampling takes one
        evaluation per step and no guidance; the paper's omega is (1 - kappa) times it. Requires train.cond_drop_rate
        above 0; examples whose condition is dropped are not guided. With (low, high) the scale is drawn per example,
        and the network needs the scalar condition `guidance_scale`, to be sampled with `guidance_embedding`.
      kappa: kappa in [0, 1), the part of the guided velocity that comes from the network instead of the example, whose
        variance guidance amplifies.
      interval: The interval of t in which the velocity is guided.
      tangent: The direction of the derivative in z: `conditional`, the velocity of the example that the network is
        regressed to, or `predicted`, the network's u(z, t, t), which depends on z alone (improved MeanFlow).
    """
    low, high = guidance if isinstance(guidance, tuple) else (guidance, float("inf"))
    if not 0 <= ratio_r_neq_t <= 1:
        raise InputError("ratio_r_neq_t", f"must be in [0, 1], got {ratio_r_neq_t}")
    checks.at_least(0, norm_p=norm_p)
    checks.positive(norm_eps=norm_eps)
    if not 0 <= low < high:
        raise InputError("guidance", f"must be at least 0, or two such numbers in ascending order, got {guidance}")
    checks.rate(kappa=kappa)
    if not 0 <= interval[0] < interval[1] <= 1:
        raise InputError("interval", f"must be two times in [0, 1] in ascending order, got {interval}")
    return MeanFlow(
        **velocity_parts(schedule, c_noise, time_sampler),
        ratio_r_neq_t=ratio_r_neq_t,
        norm_p=norm_p,
        norm_eps=norm_eps,
        guidance=guidance,
        kappa=kappa,
        interval=interval,
        tangent=tangent,
    )
