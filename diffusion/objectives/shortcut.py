"""Shortcut models: the average velocity over a step is learned from two steps of half its length, down to the shortest
steps, which are trained by flow matching (Frans et al. 2024, arXiv 2410.12557)."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import expand, flat_mean, mean_where
from diffusion.core.types import Apply, Array, Batch, Cond, InputError, Params
from diffusion.objectives.base.average_velocity import (
    AverageVelocity,
    drop_condition,
    max_step_examples,
    num_step_examples,
    velocity_parts,
)
from diffusion.objectives.base.gaussian import ScheduleSpec, TimeSamplerSpec, corrupt


@dataclasses.dataclass(frozen=True)
class Shortcut(AverageVelocity):
    """A shortcut model; see `make`."""

    base_steps: int = 128
    bootstrap: float = 0.25
    guidance: float = 1.0
    step_label: Literal["length", "log2"] = "length"

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        """Draws `t`, `r` and `weight`, all `[B]`, and `eps [B, ...]`.

        The length of a step is 1, 1/2, ... or 2 / base_steps with equal probability, and t is one of its multiples.
        """
        x = batch["x"]
        key_t, key_length, key_number, key_eps = jax.random.split(key, 4)
        t, weight = self.shuffled_times(key_t, len(x), objective_state)
        number = 2 ** jax.random.randint(key_length, t.shape, 0, self.base_steps.bit_length() - 1)
        start = jax.random.randint(key_number, t.shape, 1, number + 1)
        is_step = jnp.arange(len(x)) < num_step_examples(self.bootstrap, len(x))
        t = jnp.where(is_step, start / number, t)
        return {
            "t": t,
            "r": jnp.where(is_step, (start - 1) / number, t),
            "weight": jnp.where(is_step, 1, weight),
            "eps": jax.random.normal(key_eps, x.shape, x.dtype),
        }

    def average_velocity(
        self, net: Apply, params: Params, x: Array, t: Array, r: Array, cond: Cond, key: Array | None = None
    ) -> Array:
        """Returns u as in the base class, with the step size of the shortest steps, which flow matching trains, for
        r = t too; it is 0, or log2(base_steps)."""
        shortest = self.is_shortest(t, r)
        if self.step_label == "length":
            return super().average_velocity(net, params, x, t, jnp.where(shortest, t, r), cond, key)
        at_t, length = self.parameterization(self.schedule, t), jnp.where(shortest, 1 / self.base_steps, t - r)
        cond = {**cond, "step_size": -jnp.log2(length)}
        return net(params, expand(at_t.c_in, x) * x, at_t.c_noise, cond, key=key)

    def is_shortest(self, t: Array, r: Array) -> Array:
        """Returns whether a step is no longer than 1 / base_steps, whatever the rounding of its ends."""
        return t - r < 1.5 / self.base_steps

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        draws = batch["draws"]
        x0, t, r, cond = batch["x"], draws["t"], draws["r"], batch["cond"]
        x_t, is_step = corrupt(self.schedule, x0, draws["eps"], t), r < t
        target = self.parameterization(self.schedule, t).target(x0, draws["eps"])
        steps = max_step_examples(self.bootstrap, len(t))
        if steps:
            # The two additional evaluations are needed for the step examples only.
            first = jax.tree.map(lambda a: a[:steps], (x_t, t, r, cond))
            two_steps = self.two_half_steps(net, ema_params["net"], *first)
            target = target.at[:steps].set(jnp.where(expand(is_step[:steps], x0), two_steps, target[:steps]))
        output = self.average_velocity(net, params["net"], x_t, t, r, cond, key)
        error = flat_mean(jnp.square(output - jax.lax.stop_gradient(target)))
        metrics = {f"{name}_loss": mean_where(error, of) for name, of in (("step", is_step), ("flow", ~is_step))}
        return draws["weight"] * error, metrics

    def two_half_steps(self, net: Apply, params: Params, x: Array, t: Array, r: Array, cond: Cond) -> Array:
        """Returns the average velocity of two consecutive steps of half the length, `[B, ...]`."""
        middle = (t + r) / 2
        first = self._guided(net, params, x, t, middle, cond)
        second = self._guided(net, params, x - expand(t - middle, x) * first, middle, r, cond)
        return (first + second) / 2

    def _guided(self, net: Apply, params: Params, x: Array, t: Array, r: Array, cond: Cond) -> Array:
        """Returns the average velocity, guided for the shortest steps, from which all longer ones are learned."""
        conditional = self.average_velocity(net, params, x, t, r, cond)
        if self.guidance == 1:
            return conditional
        unconditional = self.average_velocity(net, params, x, t, r, drop_condition(cond))
        guided = unconditional + self.guidance * (conditional - unconditional)
        return jnp.where(expand(self.is_shortest(t, r), x), guided, conditional)


def make(
    schedule: ScheduleSpec = "flow",
    c_noise: Literal["time", "unit"] = "unit",
    time_sampler: TimeSamplerSpec = "uniform",
    base_steps: int = 128,
    bootstrap: float = 0.25,
    guidance: float = 1.0,
    step_label: Literal["length", "log2"] = "length",
) -> Shortcut:
    """Builds a shortcut model, for a network with the scalar condition `step_size` and the sampler `flow_map` in 1, 2,
    4, ... steps.

    Args:
      schedule: The path; its velocity must be finite at both ends.
      c_noise: The noise label: t and t - r themselves, for which a network generalises from one step length to others,
        or 1000 times these.
      time_sampler: The distribution of t for the examples trained by flow matching.
      base_steps: A power of two. The shortest step is 1 / base_steps, and the network's step size for it is 0.
      bootstrap: The fraction of the batch that is trained on steps, in [0, 1). Their targets are two steps of half the
        length, computed with the average of the parameters (the last in the config).
      guidance: The classifier-free guidance scale of the shortest steps in those targets, as in `guidance.cfg`, and
        thus of all longer steps. Requires train.cond_drop_rate above 0. Sampling with the shortest steps is not guided.
      step_label: What the network receives as `step_size`: the `length` of the step, on the scale of c_noise, or `log2`
        of the number of such steps in [0, 1], from 0 to log2(base_steps), as in the authors' code.
    """
    if base_steps < 2 or base_steps & (base_steps - 1):
        raise InputError("base_steps", f"must be a power of two of at least 2, got {base_steps}")
    checks.rate(bootstrap=bootstrap)
    checks.at_least(0, guidance=guidance)
    return Shortcut(
        **velocity_parts(schedule, c_noise, time_sampler), base_steps=base_steps, bootstrap=bootstrap,
        guidance=guidance, step_label=step_label,
    )  # fmt: skip
