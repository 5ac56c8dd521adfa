"""Reflow (Liu et al. 2023, arXiv 2209.03003): flow matching on the pairs of noise and data that a trained flow makes,
whose paths cross less and are straighter; and its distillation to one step."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion.core.types import Apply, Array, Batch, InputError, Params
from diffusion.objectives.base.gaussian import PartSpec, build_parts
from diffusion.objectives.base.rounds import Rounds
from diffusion.objectives.base.teacher import Teacher
from diffusion.sampling.guidance import cfg
from diffusion.sampling.ode.first_order import first_order


@dataclasses.dataclass(frozen=True)
class Reflow(Rounds):
    """See `make`. The memory has the `pairs`, an array of `pool` each of `x0`, `eps` and, where there are classes,
    `label`; how many `blocks` of one batch each were written in this round; and that of the law of t, `times`."""

    pool: int = 8192
    every: int = 8
    ode_steps: int = 50
    guidance: float = 1.0
    distill: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.guidance != 1 and not (self.teacher.spec.num_classes and self.teacher.cond_drop_rate):
            raise InputError("guidance", "needs a teacher that was trained with classes and without "
                             "(train.cond_drop_rate above 0); use 1")  # fmt: skip

    def initial_state(self) -> Mapping[str, Array]:
        spec = self.teacher.spec
        pairs = {name: jnp.zeros((self.pool, *spec.shape)) for name in ("x0", "eps")}
        if spec.num_classes:
            pairs["label"] = jnp.zeros(self.pool, jnp.int32)
        return {"pairs": pairs, "blocks": jnp.zeros((), jnp.int32), "time_sampler": super().initial_state()}

    def before_step(
        self,
        params: Mapping,
        ema_params: Mapping,
        batch: Batch,
        objective_state: Mapping[str, Array],
        key: Array,
        step: Array,
    ) -> tuple[dict[str, Params], Mapping[str, Array]]:
        """The round's teacher, and every so often a batch of new pairs in place of the oldest."""
        size = batch["x"].shape[0]
        if self.pool % size:
            raise InputError("objective.pool", f"must be a multiple of train.batch_size = {size}, got {self.pool}")
        params, objective_state = super().before_step(params, ema_params, batch, objective_state, key, step)
        since = self.step_in_round(step)
        fills, blocks = since % self.every == 0, jnp.where(since == 0, 0, objective_state["blocks"])

        def filled() -> dict[str, Array]:
            new, start = self.pairs(params["teacher"], batch, key, step), blocks % (self.pool // size) * size
            return {name: jax.lax.dynamic_update_slice_in_dim(old, new[name].astype(old.dtype), start, axis=0)
                    for name, old in objective_state["pairs"].items()}  # fmt: skip

        pairs = jax.lax.cond(fills, filled, lambda: objective_state["pairs"])
        return params, {**objective_state, "pairs": pairs, "blocks": blocks + fills}

    def pairs(self, teacher: Mapping, batch: Batch, key: Array, step: Array) -> dict[str, Array]:
        """Fresh noise `eps [B, ...]`, the `x0` where the teacher's ODE takes it, and the batch's labels, none dropped:
        pairs made without a condition would stand for one."""
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
        key, key_pair = jax.random.split(key)
        noise = super().draw(batch, key, step, objective_state["time_sampler"])
        size = batch["x"].shape[0]
        filled = jnp.minimum(objective_state["blocks"], self.pool // size) * size
        chosen = jax.random.randint(key_pair, (size,), 0, filled)
        noise |= {name: values[chosen] for name, values in objective_state["pairs"].items()}
        if self.distill:
            last = self.round_of(step) == self.rounds - 1
            noise |= {name: jnp.where(last, 1, noise[name]) for name in ("t", "weight")}
        return noise

    def update_state(
        self, objective_state: Mapping[str, Array], noise: Mapping[str, Array], loss: Array
    ) -> tuple[Mapping[str, Array], dict[str, Array]]:
        times, metrics = super().update_state(objective_state["time_sampler"], noise, loss)
        return {**objective_state, "time_sampler": times}, metrics

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        """The loss of the pairs that `draw` drew, so the batch has to bring its noise; of its own examples none is
        seen."""
        noise = batch["draws"]
        cond = {**batch["cond"], **({"label": noise["label"]} if "label" in noise else {})}
        return super().loss(net, params, ema_params, Batch(x=noise["x0"], cond=cond, draws=noise), key, step)


def make(
    round_steps: int,
    rounds: int = 1,
    distill: bool = False,
    pool: int = 8192,
    every: int = 8,
    ode_steps: int = 50,
    guidance: float = 1.0,
    schedule: PartSpec = "flow",
    parameterization: PartSpec = "velocity",
    time_sampler: PartSpec = "uniform",
    weighting: PartSpec = "simple",
    teacher: Teacher | None = None,
) -> Reflow:
    """Flow matching on a pool of the teacher's pairs, which is a part of the train state. The student begins with the
    teacher's weights; after each round the average of its own (the config's last) is the next one's teacher, and the
    pool begins anew.

    Args:
      round_steps: training steps of each round; `train.steps` is to be this times the number of rounds, and
        `optimizer.cycles` the number of rounds.
      rounds: how often the flow is straightened; 0 with `distill` distils the teacher as it is.
      distill: one more round in the end, at t = 1 alone, on pairs of the straightened flow: for sampling in one step
        (their section 2, "distillation"), and in one only.
      pool: pairs that are kept; a multiple of the batch size.
      every: training steps between new pairs, a batch of them each time.
      ode_steps: even steps of Euler's method that a pair takes, and as many evaluations of the teacher.
      guidance: scale of classifier-free guidance for the first teacher's pairs, 1 for none. Those who learn from them
        have it in them, and are taken without.
      schedule, parameterization: the teacher's.
      times, weighting: any.
      teacher: in a config the workdir of a trained model.
    """
    for name, value, least in (("rounds", rounds, 0 if distill else 1), ("every", every, 1), ("pool", pool, 1),
                               ("ode_steps", ode_steps, 1)):  # fmt: skip
        if value < least:
            raise InputError(name, f"must be at least {least}, got {value}")
    parts = build_parts(schedule, parameterization, time_sampler, weighting)
    return Reflow(
        **parts, teacher=teacher, rounds=rounds + distill, round_steps=round_steps, pool=pool, every=every,
        ode_steps=ode_steps, guidance=guidance, distill=distill,
    )  # fmt: skip
