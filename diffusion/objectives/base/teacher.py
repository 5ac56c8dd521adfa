"""The teacher of a distillation: a trained model, checks that it fits, and a student that starts from its weights."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import trees
from diffusion.core.types import (
    SCALAR_CONDITIONS,
    Array,
    Cond,
    Denoised,
    Denoiser,
    InputError,
    Network,
    Objective,
    Params,
    Schedule,
    Spec,
)
from diffusion.process.parameterization import Parameterization

PROBES = (0.1, 0.3, 0.5, 0.7, 0.9)  # times at which schedules and coefficients are compared


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A trained model without its parameters, which are the student's `params["teacher"]`, a dict of networks.

    Attributes:
      network: The teacher's network.
      objective: The objective that the teacher was trained with.
      spec: The spec of the data that it was trained on.
      cond_drop_rate: The fraction of examples that it was trained on without their condition.
    """

    network: Network
    objective: Objective
    spec: Spec
    cond_drop_rate: float = 0.0

    def init(self, key: Array) -> dict[str, Params]:
        """Returns an untrained dict of networks with the teacher's shapes."""
        params = self.objective.init(self.network, key)
        return {name: value for name, value in params.items() if name not in self.objective.frozen}

    def denoiser(self, params: Mapping) -> Denoiser:
        """Returns the denoiser of `params`, which ignores scalar conditions that the network does not accept."""
        denoise, accepted = self.objective.denoiser(self.network.apply, params), self.network.scalar_conditions

        def filtered(x: Array, t: Array, cond: Cond) -> Denoised:
            cond = {name: cond[name] for name in cond if name not in SCALAR_CONDITIONS or name in accepted}
            return denoise(x, t, cond)

        return filtered


def check_teacher(teacher: Teacher | None, schedule: Schedule) -> None:
    """Checks that there is a teacher, that it has this schedule, and that it predicts the posterior mean of x0."""
    if teacher is None:
        raise InputError("teacher", "is missing; set it to the workdir of a trained model, as in "
                         "--config.objective.teacher=runs/digits")  # fmt: skip
    for t in PROBES:
        t = jnp.float32(t)
        for name in ("alpha", "sigma"):
            ours, theirs = (float(getattr(s, name)(t)) for s in (schedule, teacher.objective.schedule))
            if not np.isclose(ours, theirs, rtol=1e-4):
                raise InputError("teacher", f"must have the student's schedule; {name}({float(t):.1f}) is {theirs:.4g} "
                                 f"for the teacher and {ours:.4g} for the student")  # fmt: skip
    x, cond = jnp.zeros((1, *teacher.spec.shape)), teacher.spec.zeros(1)
    denoised = jax.eval_shape(
        lambda key: teacher.denoiser(teacher.init(key))(x, jnp.float32(0.5), cond), jax.random.key(0)
    )
    if denoised.kind != "posterior_mean":
        raise InputError("teacher", f"must predict the posterior mean of x0, got a {denoised.kind} model")


def check_coefficients(teacher: Teacher, schedule: Schedule, parameterization: Parameterization) -> None:
    """Checks that the teacher's weights suit the student: the same parameterization and noise label on `schedule`.

    The schedules themselves are compared by `check_teacher`.
    """
    for t in map(jnp.float32, PROBES):
        theirs = vars(teacher.objective.parameterization(schedule, t))
        for name, ours in vars(parameterization(schedule, t)).items():
            if not np.isclose(ours, theirs[name], rtol=1e-4, atol=1e-6):
                raise InputError("teacher", f"must have the student's parameterization; {name}({float(t):.1f}) is "
                                 f"{theirs[name]:.4g} for the teacher and {ours:.4g} for the student")  # fmt: skip


def init_from_teacher(student: Params, teacher: Params) -> Params:
    """Returns the student's parameters with copies of the teacher's.

    They are copies because the train state is donated, and a buffer cannot be donated twice. The student may have extra
    parameters only for scalar conditions that the teacher lacks; these do not change the output at initialisation.

    Raises:
      InputError: The two networks differ.
    """
    ours, theirs = trees.by_path(student), trees.by_path(teacher)
    for path in sorted(ours.keys() | theirs.keys()):
        here, there = (_spell(arrays.get(path)) for arrays in (ours, theirs))
        is_extra = path not in theirs and any(part in SCALAR_CONDITIONS for part in path.split("/"))
        if here != there and not is_extra:
            problem = (
                f"must have the student's network; parameter {path} is {there} in the teacher and {here} in the "
                "student; copy the network section of the teacher's config"
            )
            raise InputError("objective.teacher", problem)
    return jax.tree.map_with_path(lambda path, leaf: jnp.array(theirs.get(trees.path_name(path), leaf)), student)


def _spell(array: Array | None) -> str:
    return "absent" if array is None else str(list(array.shape))
