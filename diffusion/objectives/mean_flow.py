"""MeanFlow: the average velocity u(z_t, t, r) learned from the identity that ties it to the velocity,

    u = v - (t - r) du/dt,   d/dt along the path, r held

(Geng et al. 2025, arXiv 2505.13447, eq. 6), and its improved form, in which nothing but the noised example decides what
the network predicts (Geng et al. 2025, arXiv 2512.02012).
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core.arrays import expand
from diffusion.core.types import Apply, Array, Batch, Cond, InputError, Params
from diffusion.layers.attention import forward_mode
from diffusion.objectives.base.average_velocity import (
    AverageVelocity,
    drop_condition,
    max_step_examples,
    num_step_examples,
    velocity_parts,
)
from diffusion.objectives.base.gaussian import PartSpec, corrupt

TIMES = {"name": "logit_normal", "mean": -0.4, "std": 1.0}  # the paper's, for ImageNet


@dataclasses.dataclass(frozen=True)
class MeanFlow(AverageVelocity):
    """See `make`."""

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
        """`t`, `r`, `weight` and, if it is drawn, `guidance`, all `[B]`, and `eps [B, ...]`."""
        x = batch["x"]
        key_t, key_r, key_eps, key_guidance = jax.random.split(key, 4)
        (t, weight_t), (r, weight_r) = (self.shuffled_times(k, len(x), objective_state) for k in (key_t, key_r))
        # The larger of two for every t, so that it has one law whether it is the end of a step or not.
        t, r = jnp.maximum(t, r), jnp.minimum(t, r)
        noise = {
            "t": t,
            "r": jnp.where(jnp.arange(len(x)) < num_step_examples(self.ratio_r_neq_t, len(x)), r, t),
            "weight": weight_t * weight_r,
            "eps": jax.random.normal(key_eps, x.shape, x.dtype),
        }
        if isinstance(self.guidance, tuple):
            low, high = self.guidance
            noise["guidance"] = jax.random.uniform(key_guidance, (len(x),), minval=low, maxval=high)
        return noise

    def average_velocity(
        self, net: Apply, params: Params, x: Array, t: Array, r: Array, cond: Cond, key: Array | None = None
    ) -> Array:
        if isinstance(self.guidance, tuple):
            cond = {"guidance_scale": jnp.ones(len(x)), **cond}
        return super().average_velocity(net, params, x, t, r, cond, key)

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        noise = batch["draws"]
        x0, t, r, eps, cond = batch["x"], noise["t"], noise["r"], noise["eps"], batch["cond"]
        if "guidance" in noise:
            cond = {**cond, "guidance_scale": noise["guidance"]}
        x_t, fixed = corrupt(self.schedule, x0, eps, t), jax.lax.stop_gradient(params["net"])
        target = self.parameterization(self.schedule, t).target(x0, eps)
        if self.guidance != 1 or self.kappa:
            target = self.guided(net, fixed, x_t, t, target, cond)

        # Where r = t the derivative does not count: it is taken of the others alone.
        steps, outputs = max_step_examples(self.ratio_r_neq_t, len(t)), []
        first, rest = (jax.tree.map(lambda a, part=part: a[part], (x_t, t, r, cond))
                       for part in (slice(steps), slice(steps, None)))  # fmt: skip
        if steps:
            x, t, r, cond = first
            along = target[:steps]
            if self.tangent == "predicted":
                along = self.average_velocity(net, fixed, x, t, t, cond)
            with forward_mode():
                output, slope = jax.jvp(
                    lambda x, t: self.average_velocity(net, params["net"], x, t, r, cond, key),
                    (x, t), (along, jnp.ones_like(t)),
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
        return noise["weight"] * weight * error, {"error": jnp.mean(jnp.square(difference))}

    def guided(self, net: Apply, fixed: Params, x: Array, t: Array, velocity: Array, cond: Cond) -> Array:
        """The velocity of the guided flow, where the condition is kept and t is in the interval: omega v + kappa
        u(z, t, t | c) + (1 - omega - kappa) u(z, t, t | none) with omega = (1 - kappa) guidance (Geng et al. 2025,
        appendix)."""
        scale, (low, high) = jnp.asarray(cond.get("guidance_scale", self.guidance)), self.interval
        none = self.average_velocity(net, fixed, x, t, t, drop_condition(cond))
        guided = none + expand(scale, x) * (velocity - none)
        if self.kappa:
            own = self.average_velocity(net, fixed, x, t, t, cond)
            guided = self.kappa * own + (1 - self.kappa) * guided
        return jnp.where(expand(cond.get("keep", True) & (t >= low) & (t <= high), x), guided, velocity)


def make(
    schedule: PartSpec = "flow",
    c_noise: Literal["time", "unit"] = "unit",
    time_sampler: PartSpec = TIMES,
    ratio_r_neq_t: float = 0.25,
    norm_p: float = 1.0,
    norm_eps: float = 1e-3,
    guidance: float | tuple[float, float] = 1.0,
    kappa: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    tangent: Literal["conditional", "predicted"] = "conditional",
) -> MeanFlow:
    """MeanFlow, for a network with the condition `r` and the sampler `flow_map`.

    Args:
      schedule: the path; any whose velocity is finite at both ends.
      c_noise: what the network is told of the times: t and t - r themselves, or 1000 times that, through which the
        derivative in t is large.
      time_sampler: the law of two times, of which t is the larger.
      ratio_r_neq_t: share of the batch with r < t, in [0, 1]; the rest, with r = t, is flow matching.
      norm_p, norm_eps: p and c of the weight 1 / (error + c)^p of each example, whose error is a sum over its entries;
        p = 0 is the plain squared error.
      guidance: what the flow that is learned is guided by, in the house's scale, so that it is sampled without guidance
        at one evaluation a step; the paper's omega is (1 - mixing) times it. It needs train.cond_drop_rate above 0,
        and examples whose condition is dropped are not guided. With (low, high) each example draws its own, and the
        network is told it: it needs the condition `guidance`, for the guidance `embedded`.
      kappa: kappa in [0, 1): how much of the guided velocity is the network's own and not the example's, whose
        variance guidance multiplies.
      interval: times t within which it is guided.
      tangent: the direction of the derivative in z: `conditional`, the velocity that the example is regressed to, or
        `predicted`, the network's own u(z, t, t), which depends on nothing but z (improved MeanFlow).
    """
    low, high = guidance if isinstance(guidance, tuple) else (guidance, float("inf"))
    for name, wrong, wanted, given in (
        ("ratio_r_neq_t", not 0 <= ratio_r_neq_t <= 1, "in [0, 1]", ratio_r_neq_t),
        ("norm_p", norm_p < 0, "at least 0", norm_p),
        ("norm_eps", norm_eps <= 0, "positive", norm_eps),
        ("guidance", not 0 <= low < high, "at least 0, or two such numbers that rise", guidance),
        ("kappa", not 0 <= kappa < 1, "in [0, 1)", kappa),
        ("interval", not 0 <= interval[0] < interval[1] <= 1, "two times in [0, 1] that rise", interval),
    ):
        if wrong:
            raise InputError(name, f"must be {wanted}, got {given}")
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
