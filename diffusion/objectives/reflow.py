"""Reflow (Liu et al. 2023, arXiv 2209.03003): flow matching on pairs of noise and data that a trained flow generates,
whose paths cross less and are straighter; and its distillation into one step."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.types import Apply, Array, Batch, InputError, Params
from diffusion.objectives.base.gaussian import (
    ParameterizationSpec,
    ScheduleSpec,
    TimeSamplerSpec,
    WeightingSpec,
    build_parts,
)
from diffusion.objectives.base.rounds import Rounds
from diffusion.objectives.base.teacher import Teacher
from diffusion.sampling.guidance import cfg
from diffusion.sampling.ode.first_order import first_order


@dataclasses.dataclass(frozen=True)
class Reflow(Rounds):
    """Reflow; see `make`.

    The objective state holds `pairs`, with arrays of length `pool` for `x0`, `eps` and the conditions;
    `blocks`, the number of batches of pairs written in this round; and `time_sampler`, the time sampler's state.
    """

    pool: int = 8192
    every: int = 8
    ode_steps: int = 50
    guidance: float = 1.0
    distill: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.guidance != 1 and not (self.teacher.spec.conditions and self.teacher.cond_drop_rate):
            raise InputError("guidance", "must be 1, except for a teacher that was trained with conditions and with "
                             "train.cond_drop_rate above 0")  # fmt: skip

    def initial_state(self, params: Mapping) -> Mapping[str, Array]:
        spec = self.teacher.spec
        pairs = {name: jnp.zeros((self.pool, *spec.shape)) for name in ("x0", "eps")}
        pairs |= jax.tree.map(jnp.asarray, spec.zeros(self.pool))
        return {"pairs": pairs, "blocks": jnp.zeros((), jnp.int32), "time_sampler": super().initial_state(params)}

    def before_step(
        self,
        params: Mapping,
        ema_params: Mapping,
        batch: Batch,
        objective_state: Mapping[str, Array],
        key: Array,
        step: Array,
    ) -> tuple[dict[str, Params], Mapping[str, Array]]:
        """Updates the teacher between rounds, and replaces the oldest pairs every `every` steps."""
        size = batch["x"].shape[0]
        if self.pool % size:
            raise InputError("objective.pool", f"must be a multiple of train.batch_size = {size}, got {self.pool}")
        params, objective_state = super().before_step(params, ema_params, batch, objective_state, key, step)
        since = self.step_in_round(step)
        fills, blocks = since % self.every == 0, jnp.where(since == 0, 0, objective_state["blocks"])

        def filled() -> dict[str, Array]:
            new, start = self.generate_pairs(params["teacher"], batch, key, step), blocks % (self.pool // size) * size
            return jax.tree.map(
                lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis=0),
                objective_state["pairs"], {name: new[name] for name in objective_state["pairs"]},
            )  # fmt: skip

        pairs = jax.lax.cond(fills, filled, lambda: objective_state["pairs"])
        return params, {**objective_state, "pairs": pairs, "blocks": blocks + fills}

    def generate_pairs(self, teacher: Mapping, batch: Batch, key: Array, step: Array) -> dict[str, Array]:
        """Generates pairs of new noise `eps [B, ...]` and the `x0` that the teacher's ODE maps it to.

        The pairs have the conditions of the batch, none of them dropped, so that each x0 belongs to its condition.
        """
        cond = {name: value for name, value in batch["cond"].items() if name != "keep"}
        denoise = self.teacher.denoiser(teacher)
        if self.guidance != 1:
            denoise = cfg(denoise, jnp.where(self.round_of(step) == 0, self.guidance, 1.0))
        eps = jax.random.normal(key, batch["x"].shape, batch["x"].dtype)
        times = jnp.arange(self.ode_steps, -1, -1) / self.ode_steps

        def advance(x: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
            t, s = step
            return first_order(self.schedule, x, denoise(x, t, cond), t, s).astype(x.dtype), None

        start = (self.schedule.sigma(times[0]) * eps).astype(eps.dtype)
        x0, _ = jax.lax.scan(advance, start, (times[:-1], times[1:]))
        return {**cond, "x0": x0, "eps": eps}

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        """Draws `t`, `weight` and pairs `x0`, `eps` and their conditions of this round."""
        key, key_pair = jax.random.split(key)
        draws = super().draw(batch, key, step, objective_state["time_sampler"])
        size = batch["x"].shape[0]
        filled = jnp.minimum(objective_state["blocks"], self.pool // size) * size
        chosen = jax.random.randint(key_pair, (size,), 0, filled)
        draws |= jax.tree.map(lambda values: values[chosen], objective_state["pairs"])
        if self.distill:
            last = self.round_of(step) == self.rounds - 1
            draws |= {name: jnp.where(last, 1, draws[name]) for name in ("t", "weight")}
        return draws

    def update_state(
        self, objective_state: Mapping[str, Array], draws: Mapping[str, Array], loss: Array
    ) -> tuple[Mapping[str, Array], dict[str, Array]]:
        sampler_state, metrics = super().update_state(objective_state["time_sampler"], draws, loss)
        return {**objective_state, "time_sampler": sampler_state}, metrics

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Returns the loss of the pairs that `draw` drew; the examples of the batch are not used."""
        draws = batch["draws"]
        cond = {**batch["cond"], **{name: draws[name] for name in self.teacher.spec.conditions}}
        return super().loss(net, params, ema_params, Batch(x=draws["x0"], cond=cond, draws=draws), key, step)


def make(
    round_steps: int,
    rounds: int = 1,
    distill: bool = False,
    pool: int = 8192,
    every: int = 8,
    ode_steps: int = 50,
    guidance: float = 1.0,
    schedule: ScheduleSpec = "flow",
    parameterization: ParameterizationSpec = "velocity",
    time_sampler: TimeSamplerSpec = "uniform",
    weighting: WeightingSpec = "simple",
    teacher: Teacher | None = None,
) -> Reflow:
    """Builds flow matching on a pool of pairs from a teacher; the pool is part of the train state.

    The student starts from the teacher's weights. After each round the average of its weights (the last in the config)
    becomes the teacher of the next round, and the pool is refilled.

    Args:
      round_steps: The number of training steps per round. Set `train.steps` to this times the number of rounds, and
        `optimizer.cycles` to the number of rounds.
      rounds: How many times the flow is straightened; 0 with `distill` distils the teacher as it is.
      distill: Whether to add a last round at t = 1 alone, on pairs of the straightened flow, for sampling in one step
        (their section 2, "distillation"), and only in one.
      pool: The number of pairs in the pool; a multiple of the batch size.
      every: The number of training steps between batches of new pairs.
      ode_steps: The number of even Euler steps, and thus of evaluations of the teacher, per pair.
      guidance: The scale of classifier-free guidance of the first teacher's pairs; 1 disables it. Later teachers have
        learned the guided flow, so they are not guided.
      schedule, parameterization: Those of the teacher.
      time_sampler, weighting: Any.
      teacher: A trained model; in a config, its workdir.
    """
    checks.at_least(0 if distill else 1, rounds=rounds)
    checks.at_least(1, every=every, pool=pool, ode_steps=ode_steps)
    parts = build_parts(schedule, parameterization, time_sampler, weighting)
    return Reflow(
        **parts, teacher=teacher, rounds=rounds + distill, round_steps=round_steps, pool=pool, every=every,
        ode_steps=ode_steps, guidance=guidance, distill=distill,
    )  # fmt: skip
