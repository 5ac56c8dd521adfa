"""Shortcut models: the average velocity over a step learned from two steps of half its length, down to the shortest
ones, which flow matching trains (Frans et al. 2024, arXiv 2410.12557)."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core.arrays import expand, flat_mean
from diffusion.core.types import Apply, Array, Batch, Cond, InputError, Params
from diffusion.objectives.base.average_velocity import (
    AverageVelocity,
    drop_condition,
    max_step_examples,
    num_step_examples,
    velocity_parts,
)
from diffusion.objectives.base.gaussian import PartSpec, corrupt


@dataclasses.dataclass(frozen=True)
class Shortcut(AverageVelocity):
    """See `make`."""

    base_steps: int = 128
    bootstrap: float = 0.25
    guidance: float = 1.0

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        """`t`, `r` and `weight`, all `[B]`, and `eps [B, ...]`. A step's length is 1, 1/2, ... or 2 / base_steps, each
        as probable as the others, and t any of its multiples."""
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
        """As in the base, but the network is told of the shortest steps as of none: flow matching is what trains
        them."""
        return super().average_velocity(net, params, x, t, jnp.where(self.shortest(t, r), t, r), cond, key)

    def shortest(self, t: Array, r: Array) -> Array:
        """Whether a step is no longer than 1 / base_steps, however its ends are rounded."""
        return t - r < 1.5 / self.base_steps

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        noise = batch["draws"]
        x0, t, r, cond = batch["x"], noise["t"], noise["r"], batch["cond"]
        x_t, is_step = corrupt(self.schedule, x0, noise["eps"], t), r < t
        target = self.parameterization(self.schedule, t).target(x0, noise["eps"])
        steps = max_step_examples(self.bootstrap, len(t))
        if steps:
            # Two evaluations more, of those alone that need them.
            first = jax.tree.map(lambda a: a[:steps], (x_t, t, r, cond))
            target = target.at[:steps].set(
                jnp.where(
                    expand(is_step[:steps], x0), self.of_two_halves(net, ema_params["net"], *first), target[:steps]
                )
            )
        output = self.average_velocity(net, params["net"], x_t, t, r, cond, key)
        error = flat_mean(jnp.square(output - jax.lax.stop_gradient(target)))
        metrics = {f"{name}_loss": jnp.mean(error, where=of) for name, of in (("step", is_step), ("flow", ~is_step))}
        return noise["weight"] * error, metrics

    def of_two_halves(self, net: Apply, params: Params, x: Array, t: Array, r: Array, cond: Cond) -> Array:
        """The average velocity of the two halves of a step, one after the other, `[B, ...]`."""
        middle = (t + r) / 2
        first = self._guided(net, params, x, t, middle, cond)
        second = self._guided(net, params, x - expand(t - middle, x) * first, middle, r, cond)
        return (first + second) / 2

    def _guided(self, net: Apply, params: Params, x: Array, t: Array, r: Array, cond: Cond) -> Array:
        """The average velocity; of a shortest step the guided one, from which all longer ones learn theirs."""
        own = self.average_velocity(net, params, x, t, r, cond)
        if self.guidance == 1:
            return own
        none = self.average_velocity(net, params, x, t, r, drop_condition(cond))
        return jnp.where(expand(self.shortest(t, r), x), none + self.guidance * (own - none), own)


def make(
    schedule: PartSpec = "flow",
    c_noise: Literal["time", "unit"] = "unit",
    time_sampler: PartSpec = "uniform",
    base_steps: int = 128,
    bootstrap: float = 0.25,
    guidance: float = 1.0,
) -> Shortcut:
    """A shortcut model, for a network with the condition `r` and the sampler `flow_map` in 1, 2, 4, ... steps.

    Args:
      schedule: the path; any whose velocity is finite at both ends.
      c_noise: what the network is told of the times: t and t - r themselves, in which what it learns of one length
        carries over to the others, or 1000 times that.
      time_sampler: the law of t where flow matching is trained.
      base_steps: a power of two: the shortest step is 1 / base_steps, and taken for none.
      bootstrap: share of the batch that is trained on steps, in [0, 1); their targets are two steps of half the length
        by the average of the parameters (the config's last).
      guidance: of the shortest steps in those targets, and so of all longer ones; a scale as in `guidance.cfg`. It
        needs train.cond_drop_rate above 0. Steps as short as the shortest stay unguided.
    """
    if base_steps < 2 or base_steps & (base_steps - 1):
        raise InputError("base_steps", f"must be a power of two of at least 2, got {base_steps}")
    if not 0 <= bootstrap < 1:
        raise InputError("bootstrap", f"must be in [0, 1), got {bootstrap}")
    if guidance < 0:
        raise InputError("guidance", f"must be at least 0, got {guidance}")
    return Shortcut(
        **velocity_parts(schedule, c_noise, time_sampler), base_steps=base_steps, bootstrap=bootstrap, guidance=guidance
    )
