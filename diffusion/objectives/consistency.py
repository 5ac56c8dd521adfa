"""Consistency models in discrete time: a network that maps any point of an ODE path to the path's end, trained to give
the same result at two points of a path. The options give consistency training and distillation (CT, CD; Song et al.
2023, arXiv 2303.01469), improved consistency training (iCT; Song & Dhariwal 2023, arXiv 2310.14189) and easy
consistency tuning of a diffusion model (ECT; Geng et al. 2024, arXiv 2406.14548).

| option | CT | CD | iCT | ECT |
|---|---|---|---|---|
| discretization | square_root | fixed | doubling | ratio |
| time_sampler | karras | karras | log_normal | log_normal |
| solver | None | heun | None | None |
| target | average | average | student | student |
| metric | l2 | l2 | pseudo_huber | pseudo_huber, `huber` = 0 |
| weighting | one | one | inverse_step | inverse_c_out |
| teacher | | a workdir, or `joint_teacher` | | a workdir |

The papers' CT and CD use LPIPS as the metric, which is not implemented here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks
from diffusion.core.arrays import expand, flat_mean, per_example
from diffusion.core.build import build
from diffusion.core.types import (
    Apply,
    Array,
    Batch,
    Cond,
    Denoised,
    Denoiser,
    InputError,
    Network,
    Objective,
    Params,
    Schedule,
)
from diffusion.objectives.base.discretization import Discretization
from diffusion.objectives.base.gaussian import (
    DiscretizationSpec,
    Gaussian,
    ObjectiveSpec,
    ParameterizationSpec,
    ScheduleSpec,
    TimeSamplerSpec,
    build_parts,
    corrupt,
)
from diffusion.objectives.base.teacher import Teacher, check_teacher, init_from_teacher
from diffusion.sampling.guidance import cfg
from diffusion.sampling.ode.first_order import coordinate, first_order

SAMPLER = {"name": "consistency", "steps": 2}  # of a config without a sampler
Solver = Literal["ddim", "euler", "heun"]
Weighting = Literal["one", "inverse_step", "inverse_c_out"]
SMALLEST = 1e-30  # stands for a mean square of 0 where its root is differentiated


@dataclasses.dataclass(frozen=True)
class ConsistencyObjective(Gaussian):
    """A consistency model in discrete time; see `make`.

    The dict of networks has `net`, `target` if the target is an average, and `teacher` if there is a solver.
    """

    discretization: Discretization | None = None
    t_min: float = 0.0
    target: Literal["student", "average"] = "student"
    metric: Literal["l2", "pseudo_huber"] = "pseudo_huber"
    huber: float = 0.00054
    step_weighting: Weighting = "inverse_step"
    solver: Solver | None = None
    guidance: float = 1.0
    teacher: Teacher | None = None
    joint_teacher: Objective | None = None

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        params = super().init(network, key)
        if self.joint_teacher is not None:
            params["teacher"] = self.joint_teacher.init(network, jax.random.fold_in(key, 1))
        elif self.teacher is not None:
            teacher = self.teacher.init(key) if teacher is None else teacher
            params["net"] = init_from_teacher(params["net"], teacher["net"])
            if self.solver:
                params["teacher"] = teacher
        if self.target == "average":
            params["target"] = jax.tree.map(jnp.array, params["net"])
        return params

    def before_step(
        self,
        params: Mapping,
        ema_params: Mapping,
        batch: Batch,
        objective_state: Mapping[str, Array],
        key: Array,
        step: Array,
    ) -> tuple[dict[str, Params], Mapping[str, Array]]:
        if self.target == "student":
            return dict(params), objective_state
        decay = self.discretization.decay(step)
        target = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, params["target"], params["net"])
        return {**params, "target": target}, objective_state

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        """Draws as the base class does, and adds the earlier time `r [B]` and the draws of a `joint_teacher`."""
        key, key_teacher = jax.random.split(key)
        draws = super().draw(batch, key, step, objective_state)
        t, r = self.discretization.pair(self.schedule, draws["t"], self.t_min, step)
        draws = {**draws, "t": t, "r": r}
        if self.joint_teacher is not None:
            draws["joint_teacher"] = self.joint_teacher.draw(batch, key_teacher, step, {})
        return draws

    def consistency_function(
        self, net: Apply, params: Params, x: Array, t: Array, cond: Cond, key: Array | None = None
    ) -> Array:
        """Returns f(x, t), the end of the path through x at t `[B]`; it is x / alpha bit for bit at t_min."""
        coefficients = self.parameterization(self.schedule, t)
        # Where the noise label is infinite, c_out is 0. The network must still be finite, since 0 times NaN is NaN.
        c_noise = jnp.where(jnp.isfinite(coefficients.c_noise), coefficients.c_noise, 0)
        return coefficients.to_x0(net(params, expand(coefficients.c_in, x) * x, c_noise, cond, key=key), x)

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        draws = batch["draws"]
        x0, cond, t, r, eps = batch["x"], batch["cond"], draws["t"], draws["r"], draws["eps"]
        x_t = corrupt(self.schedule, x0, eps, t)
        metrics = self.discretization.metrics(step)
        if self.solver is None:
            x_r = corrupt(self.schedule, x0, eps, r)
        else:
            x_r = self.solver_step(self.teacher_denoiser(net, params, ema_params), x_t, t, r, cond)
        # Both evaluations use the same dropout key, so that they differ only by the two points.
        target = params["target"] if self.target == "average" else params["net"]
        target = jax.lax.stop_gradient(self.consistency_function(net, target, jax.lax.stop_gradient(x_r), r, cond, key))
        square = flat_mean(jnp.square(self.consistency_function(net, params["net"], x_t, t, cond, key) - target))
        distance = square
        if self.metric == "pseudo_huber":
            # sqrt(square + c^2) - c, in a form without cancellation near 0
            distance = square / (jnp.sqrt(jnp.maximum(square + self.huber**2, SMALLEST)) + self.huber)
        if self.step_weighting == "inverse_step":
            path = coordinate(None, self.schedule)
            distance /= path.from_time(t) - path.from_time(r)
        elif self.step_weighting == "inverse_c_out":
            distance /= jnp.square(self.parameterization(self.schedule, t).c_out)
        loss = draws["weight"] * distance
        if self.joint_teacher is not None:
            its_batch = {**batch, "draws": draws["joint_teacher"]}
            teacher_loss, _ = self.joint_teacher.loss(
                net, params["teacher"], ema_params["teacher"], its_batch, key, step
            )
            loss, metrics = loss + teacher_loss, {**metrics, "teacher_loss": jnp.mean(teacher_loss)}
        return loss, metrics

    def teacher_denoiser(self, net: Apply, params: Mapping, ema_params: Mapping) -> Denoiser:
        """Returns the guided denoiser whose ODE the solver follows."""
        if self.joint_teacher is not None:
            denoise = self.joint_teacher.denoiser(net, jax.lax.stop_gradient(ema_params["teacher"]))
        else:
            denoise = self.teacher.denoiser(params["teacher"])
        return denoise if self.guidance == 1 else cfg(denoise, self.guidance)

    def solver_step(self, denoise: Denoiser, x_t: Array, t: Array, r: Array, cond: Cond) -> Array:
        """Returns x at r after one step of the solver along the teacher's ODE from t, both `[B]`."""
        schedule, x0 = self.schedule, denoise(x_t, t, cond).x0
        if self.solver == "ddim":
            return jax.vmap(lambda x, x0, t, r: first_order(schedule, x, Denoised(x0), t, r))(x_t, x0, t, r)
        path = coordinate(None, schedule)
        slope, move = jax.vmap(path.slope), jax.vmap(path.move)
        first = slope(x_t, x0, t)
        x_r = move(x_t, first, t, r)
        if self.solver == "euler":
            return x_r
        second = slope(x_r, denoise(x_r, r, cond).x0, r)
        # The slope is undefined at r = 0, where there is no noise.
        mean = jnp.where(expand(schedule.sigma(r) > 0, x_t), (first + second) / 2, first)
        return move(x_t, mean, t, r)

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        def denoise(x: Array, t: Array, cond: Cond) -> Denoised:
            t = per_example(t, x)
            return Denoised(self.consistency_function(net, params["net"], x, t, cond), kind="consistency")

        return denoise


def make(
    discretization: DiscretizationSpec = "fixed",
    schedule: ScheduleSpec = "edm",
    parameterization: ParameterizationSpec = "consistency",
    time_sampler: TimeSamplerSpec = "karras",
    weighting: Weighting = "inverse_step",
    metric: Literal["l2", "pseudo_huber"] = "pseudo_huber",
    huber: float = 0.00054,
    target: Literal["student", "average"] = "student",
    sigma_min: float = 0.002,
    solver: Solver | None = None,
    guidance: float = 1.0,
    teacher: Teacher | None = None,
    joint_teacher: ObjectiveSpec | None = None,
) -> ConsistencyObjective:
    """Builds a consistency model in discrete time; the table in the module docstring lists the papers' choices.

    Args:
      discretization: A part of `base.discretization`: the two times at which the model is trained to agree, and how
        they change during training.
      schedule: The path.
      parameterization: One whose x0 is x / alpha at the noise level `sigma_min`: `consistency` with the same sigma_min,
        or edm, v or velocity with `sigma_min = 0`.
      time_sampler: The distribution of t, before the discretization moves t to a point of its grid.
      weighting: The weight of the distance: `one` is 1; `inverse_step` 1 / (t - r), in noise levels sigma / alpha, or
        in times if the schedule ends in pure noise; `inverse_c_out` 1 / c_out(t)^2, which for the parameterization edm
        is 1 / t^2 + 1 / sigma_data^2 in noise levels, the weight of ECT's code.
      metric: The distance: the mean square `l2`, or `pseudo_huber`, sqrt(mean square + huber^2) - huber, which is the
        paper's divided by the square root of the number of dimensions.
      huber: The constant c of the pseudo-Huber metric, divided by the square root of the number of dimensions; 0 gives
        the root of the mean square, as in ECT's code.
      target: The network applied at the earlier point: the current `student`, or its `average` with the
        discretization's decay. It receives no gradient.
      sigma_min: The noise level of the boundary, at which a path ends.
      solver: How the earlier point is found: None uses the same x0 and noise at r; `ddim`, `euler` and `heun` take one
        step along the teacher's ODE.
      guidance: The scale of classifier-free guidance of the teacher, as in `guidance.cfg`.
      teacher: A trained model on the same schedule. The student starts from its weights, and a solver follows its ODE.
      joint_teacher: Alternative to `teacher`: the section of an objective (`{"name": "denoising", ...}`) that trains a
        teacher in the same run, on the student's schedule. A solver follows the teacher's EMA.
    """
    parts = build_parts(schedule, parameterization, time_sampler, "simple")
    path = parts["schedule"]
    checks.at_least(0, huber=huber, sigma_min=sigma_min)
    if teacher is not None and joint_teacher is not None:
        raise InputError("joint_teacher", "must be None if there is a teacher; remove one of the two")
    trained = None
    if joint_teacher is not None:
        if solver is None:
            raise InputError("solver", "must not be None with a joint_teacher, which only a solver uses; use heun")
        trained = build("objectives", joint_teacher, field="joint_teacher", schedule=schedule)
    elif solver is not None or teacher is not None:
        check_teacher(teacher, path)
    if guidance != 1 and (teacher is None or not teacher.cond_drop_rate):
        raise InputError("guidance", "must be 1, except for a teacher trained with train.cond_drop_rate above 0")
    t_min = _boundary(path, sigma_min)
    start = parts["parameterization"](path, jnp.float32(t_min))
    if start.c_out != 0 or start.c_skip != 1 / path.alpha(jnp.float32(t_min)):
        raise InputError("parameterization", f"must give x0 = x at sigma_min = {sigma_min}, but c_skip is "
                         f"{start.c_skip:.4g} and c_out {start.c_out:.4g}; use consistency with the same sigma_min, or "
                         "edm, v or velocity with sigma_min = 0")  # fmt: skip
    frozen = ("target",) if target == "average" else ()
    if teacher is not None and solver is not None:
        frozen += ("teacher",)
    return ConsistencyObjective(
        **parts,
        frozen=frozen,
        discretization=build("discretization", discretization, field="discretization"),
        t_min=t_min,
        target=target,
        metric=metric,
        huber=huber,
        step_weighting=weighting,
        solver=solver,
        guidance=guidance,
        teacher=teacher,
        joint_teacher=trained,
    )


def _boundary(schedule: Schedule, sigma_min: float) -> float:
    """Returns the largest float32 time whose noise level sigma / alpha does not exceed sigma_min despite rounding."""
    highest = float(jnp.exp(-schedule.log_snr(jnp.float32(1)) / 2))
    if not sigma_min < highest:
        raise InputError("sigma_min", f"must be below {highest:g}, where the schedule ends, got {sigma_min}")
    if sigma_min == 0:
        return 0.0
    t = np.float32(schedule.time(jnp.float32(-2 * np.log(sigma_min))))
    while t > 0 and not schedule.sigma(jnp.float32(t)) < np.float32(sigma_min) * schedule.alpha(jnp.float32(t)):
        t = np.nextafter(t, np.float32(0))
    return float(t)
