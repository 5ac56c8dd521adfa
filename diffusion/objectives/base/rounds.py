"""What methods share that train in rounds: the student begins with its teacher's weights, and what one round has made
of them teaches the next."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion.core.types import Array, Batch, InputError, Network, Params
from diffusion.objectives.base.gaussian import Gaussian
from diffusion.objectives.base.teacher import Teacher, begin, check_coefficients, check_teacher


@dataclasses.dataclass(frozen=True)
class Rounds(Gaussian):
    """A `Gaussian` with a frozen teacher. The round follows from the step alone, and the last one goes on for as long
    as training does.

    Attributes:
      teacher: of the first round.
      rounds: how many there are.
      round_steps: training steps of each.
    """

    frozen: tuple[str, ...] = ("teacher",)
    teacher: Teacher | None = None
    rounds: int = 1
    round_steps: int = 1

    def __post_init__(self):
        if self.round_steps < 1:
            raise InputError("round_steps", f"must be at least 1, got {self.round_steps}")
        check_teacher(self.teacher, self.schedule)
        check_coefficients(self.teacher, self.schedule, self.parameterization)

    def round_of(self, step: Array) -> Array:
        """The round that a step belongs to, counted from 0."""
        return jnp.minimum(step // self.round_steps, self.rounds - 1)

    def step_in_round(self, step: Array) -> Array:
        """Steps since the round began."""
        return step - self.round_of(step) * self.round_steps

    def hands_over(self, step: Array) -> Array:
        """Whether a step is the first of a round that is not the first."""
        return (step > 0) & (self.step_in_round(step) == 0)

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        net = super().init(network, key)["net"]
        teacher = self.teacher.init(key) if teacher is None else teacher
        net = begin(net, teacher["net"])
        if jax.tree.structure(net) != jax.tree.structure(teacher["net"]):
            raise InputError("network.conditions", "tells the student numbers that its teacher is not told; remove "
                             "them, for the student becomes a teacher itself")  # fmt: skip
        return {"net": net, "teacher": dict(teacher)}

    def before_step(
        self,
        params: Mapping,
        ema_params: Mapping,
        batch: Batch,
        objective_state: Mapping[str, Array],
        key: Array,
        step: Array,
    ) -> tuple[dict[str, Params], Mapping[str, Array]]:
        taught = jax.lax.cond(self.hands_over(step), lambda: ema_params["net"], lambda: params["teacher"]["net"])
        return {**params, "teacher": {**params["teacher"], "net": taught}}, objective_state
