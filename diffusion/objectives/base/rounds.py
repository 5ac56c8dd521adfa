"""The base of objectives that distil in rounds.

The student starts from its teacher's weights, and the average of the student after one round is the teacher of the
next.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.types import Array, Batch, InputError, Network, Params
from diffusion.objectives.base.gaussian import Gaussian
from diffusion.objectives.base.teacher import Teacher, check_coefficients, check_teacher, init_from_teacher


@dataclasses.dataclass(frozen=True)
class Rounds(Gaussian):
    """A `Gaussian` with a frozen teacher that changes from round to round.

    The round depends on the training step alone. The last round lasts until training ends.

    Attributes:
      teacher: The teacher of the first round.
      rounds: The number of rounds.
      round_steps: The number of training steps per round.
    """

    frozen: tuple[str, ...] = ("teacher",)
    teacher: Teacher | None = None
    rounds: int = 1
    round_steps: int = 1

    def __post_init__(self):
        checks.at_least(1, round_steps=self.round_steps)
        check_teacher(self.teacher, self.schedule)
        check_coefficients(self.teacher, self.schedule, self.parameterization)

    def round_of(self, step: Array) -> Array:
        """Returns the round that a step belongs to, counted from 0."""
        return jnp.minimum(step // self.round_steps, self.rounds - 1)

    def step_in_round(self, step: Array) -> Array:
        """Returns the number of steps since the round began."""
        return step - self.round_of(step) * self.round_steps

    def starts_new_round(self, step: Array) -> Array:
        """Returns whether a step is the first of a round other than the first."""
        return (step > 0) & (self.step_in_round(step) == 0)

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        net = super().init(network, key)["net"]
        teacher = self.teacher.init(key) if teacher is None else teacher
        net = init_from_teacher(net, teacher["net"])
        if jax.tree.structure(net) != jax.tree.structure(teacher["net"]):
            raise InputError("network.scalar_conditions", "must be those of the teacher's network, because the student "
                             "becomes the teacher of the next round; remove the others")  # fmt: skip
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
        net = jax.lax.cond(self.starts_new_round(step), lambda: ema_params["net"], lambda: params["teacher"]["net"])
        return {**params, "teacher": {**params["teacher"], "net": net}}, objective_state
