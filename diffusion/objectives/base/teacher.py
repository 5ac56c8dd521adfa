"""What methods that learn from a trained model share: the teacher, what it must fit, and a student that begins with its
weights."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.types import Array, Cond, Denoised, Denoiser, InputError, Network, Objective, Params, Schedule, Spec
from diffusion.process.parameterization import Parameterization

PROBES = (0.1, 0.3, 0.5, 0.7, 0.9)  # times at which two schedules are compared


@dataclasses.dataclass(frozen=True, eq=False)
class Teacher:
    """A trained model without its parameters, which are the student's `params["teacher"]`, a dict of networks.

    Attributes:
      spec: of the data that it was trained on.
      cond_drop_rate: share of the examples that it was trained on without their condition.
    """

    network: Network
    objective: Objective
    spec: Spec
    cond_drop_rate: float = 0.0

    def init(self, key: Array) -> dict[str, Params]:
        """A dict of networks of the right shapes, not trained."""
        made = self.objective.init(self.network, key)
        return {name: params for name, params in made.items() if name not in self.objective.frozen}

    def denoiser(self, params: Mapping) -> Denoiser:
        """Of the dict of networks `params`. It is not told numbers that its network does not take."""
        denoise, numbers = self.objective.denoiser(self.network.apply, params), self.network.scalar_conditions

        def asked(x: Array, t: Array, cond: Cond) -> Denoised:
            kept = {name: cond[name] for name in cond if name not in ("step_size", "guidance_scale") or name in numbers}
            return denoise(x, t, kept)

        return asked


def check_teacher(teacher: Teacher | None, schedule: Schedule) -> None:
    """Refuses a teacher that is missing, that has another schedule, or that does not give the mean of x0."""
    if teacher is None:
        raise InputError(
            "teacher", "is missing: the workdir of a trained model, as --config.objective.teacher=runs/digits"
        )
    for t in PROBES:
        t = jnp.float32(t)
        for name in ("alpha", "sigma"):
            ours, theirs = (float(getattr(s, name)(t)) for s in (schedule, teacher.objective.schedule))
            if not np.isclose(ours, theirs, rtol=1e-4):
                raise InputError("teacher", f"has another schedule: {name}({float(t):.1f}) is {theirs:.4g} there and "
                                 f"{ours:.4g} here; give both the same")  # fmt: skip
    x, labels = jnp.zeros((1, *teacher.spec.shape)), jnp.zeros(1, jnp.int32)
    cond = {"label": labels} if teacher.spec.num_classes else {}
    answer = jax.eval_shape(
        lambda key: teacher.denoiser(teacher.init(key))(x, jnp.float32(0.5), cond), jax.random.key(0)
    )
    if answer.kind != "posterior_mean":
        raise InputError("teacher", "is a few-step model itself; give one that predicts the mean of x0")


def check_coefficients(teacher: Teacher, schedule: Schedule, parameterization: Parameterization) -> None:
    """Refuses a teacher whose network is given or gives something else than the student's (another parameterization or
    noise label), so that its weights would be of no use there. The schedule is the same (`check_teacher`)."""
    for t in map(jnp.float32, PROBES):
        theirs = vars(teacher.objective.parameterization(schedule, t))
        for name, ours in vars(parameterization(schedule, t)).items():
            if not np.isclose(ours, theirs[name], rtol=1e-4, atol=1e-6):
                raise InputError("teacher", f"has another parameterization: {name}({float(t):.1f}) is "
                                 f"{theirs[name]:.4g} there and {ours:.4g} here; give both the same")  # fmt: skip


def begin(student: Params, teacher: Params) -> Params:
    """The student's network with copies of the teacher's weights: the train state is donated, and one buffer cannot be
    given away twice. It may have more in it only for the numbers that it is told and the teacher is not, which add
    nothing at the beginning.

    Raises:
      InputError: the two networks differ.
    """
    ours, theirs = _by_path(student), _by_path(teacher)
    for path in sorted(ours.keys() | theirs.keys()):
        here, there = (_spell(arrays.get(path)) for arrays in (ours, theirs))
        if here != there and not (path not in theirs and "number" in path):
            raise InputError("objective.teacher", f"has another network: {path} is {there} there and {here} here; give "
                             "the student the network section of the teacher's config")  # fmt: skip
    return jax.tree.map_with_path(lambda path, leaf: jnp.array(theirs.get(_name(path), leaf)), student)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _by_path(params: Params) -> dict[str, Array]:
    return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def _spell(array: Array | None) -> str:
    return "absent" if array is None else str(list(array.shape))
