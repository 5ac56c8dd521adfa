"""Consistency models in discrete time: a network that takes any point of an ODE's path to the path's end, trained to
give the same from two of its points. By its options: consistency training and distillation (CT, CD; Song et al. 2023,
arXiv 2303.01469), improved training (iCT; Song & Dhariwal 2023, arXiv 2310.14189), easy tuning of a diffusion model
(ECT; Geng et al. 2024, arXiv 2406.14548).

| option | CT | CD | iCT | ECT |
|---|---|---|---|---|
| discretization | square_root | fixed | doubling | ratio |
| times | karras | karras | log_normal | log_normal |
| solver | None | heun | None | None |
| target | average | average | student | student |
| metric | l2 | l2 | pseudo_huber | pseudo_huber |
| weighting | one | one | inverse_step | inverse_step |
| teacher | | a workdir, or `joint_teacher` | | a workdir |

The papers' CT and CD measure by LPIPS, a network of its own, which is not here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand, flat_mean
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
from diffusion.objectives.base.gaussian import Gaussian, PartSpec, build_parts, corrupt
from diffusion.objectives.base.teacher import Teacher, begin, check_teacher
from diffusion.sampling.guidance import cfg
from diffusion.sampling.ode.first_order import coordinate, first_order

Solver = Literal["ddim", "euler", "heun"]


@dataclasses.dataclass(frozen=True)
class ConsistencyObjective(Gaussian):
    """See `make`. The dict of networks is `{"net"}`, `target` if that is an average, `teacher` if there is a solver."""

    discretization: Discretization | None = None
    t_min: float = 0.0
    target: Literal["student", "average"] = "student"
    metric: Literal["l2", "pseudo_huber"] = "pseudo_huber"
    huber: float = 0.00054
    step_weighting: Literal["one", "inverse_step"] = "inverse_step"
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
            params["net"] = begin(params["net"], teacher["net"])
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
        key, key_beside = jax.random.split(key)
        noise = super().draw(batch, key, step, objective_state)
        t, r = self.discretization.pair(self.schedule, noise["t"], self.t_min, step)
        noise = {**noise, "t": t, "r": r}
        if self.joint_teacher is not None:
            noise["joint_teacher"] = self.joint_teacher.draw(batch, key_beside, step, {})
        return noise

    def end(self, net: Apply, params: Params, x: Array, t: Array, cond: Cond, key: Array | None = None) -> Array:
        """f(x, t), where the path through x at t `[B]` ends: at t_min x / alpha bit for bit, which is x at t = 0."""
        row = self.parameterization(self.schedule, t)
        # Of no account where c_out is 0, but 0 times what a network makes of an infinite number is none.
        c_noise = jnp.where(jnp.isfinite(row.c_noise), row.c_noise, 0)
        return row.to_x0(net(params, expand(row.c_in, x) * x, c_noise, cond, key=key), x)

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        noise = batch["draws"]
        x0, cond, t, r, eps = batch["x"], batch["cond"], noise["t"], noise["r"], noise["eps"]
        x_t = corrupt(self.schedule, x0, eps, t)
        metrics = self.discretization.metrics(step)
        if self.solver is None:
            x_r = corrupt(self.schedule, x0, eps, r)
        else:
            x_r = self._solved(self._teacher(net, params, ema_params), x_t, t, r, cond)
        # One key for both: what dropout leaves out is the same, and the difference is that of the two points.
        target = params["target"] if self.target == "average" else params["net"]
        target = jax.lax.stop_gradient(self.end(net, target, jax.lax.stop_gradient(x_r), r, cond, key))
        square = flat_mean(jnp.square(self.end(net, params["net"], x_t, t, cond, key) - target))
        distance = square
        if self.metric == "pseudo_huber":
            distance = square / (jnp.sqrt(square + self.huber**2) + self.huber)  # sqrt(square + c^2) - c, exact near 0
        if self.step_weighting == "inverse_step":
            at = coordinate(None, self.schedule).at
            distance /= at(t) - at(r)
        loss = noise["weight"] * distance
        if self.joint_teacher is not None:
            own = {**batch, "draws": noise["joint_teacher"]}
            diffusion, _ = self.joint_teacher.loss(net, params["teacher"], ema_params["teacher"], own, key, step)
            loss, metrics = loss + diffusion, {**metrics, "teacher_loss": jnp.mean(diffusion)}
        return loss, metrics

    def _teacher(self, net: Apply, params: Mapping, ema_params: Mapping) -> Denoiser:
        if self.joint_teacher is not None:
            denoise = self.joint_teacher.denoiser(net, jax.lax.stop_gradient(ema_params["teacher"]))
        else:
            denoise = self.teacher.denoiser(params["teacher"])
        return denoise if self.guidance == 1 else cfg(denoise, self.guidance)

    def _solved(self, denoise: Denoiser, x_t: Array, t: Array, r: Array, cond: Cond) -> Array:
        """x at r, by one step of the solver along the teacher's ODE from t, both `[B]`."""
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
        # At r = 0 there is no noise left that could have a direction.
        mean = jnp.where(expand(schedule.sigma(r) > 0, x_t), (first + second) / 2, first)
        return move(x_t, mean, t, r)

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        def denoise(x: Array, t: Array, cond: Cond) -> Denoised:
            return Denoised(self.end(net, params["net"], x, jnp.broadcast_to(t, x.shape[:1]), cond), kind="consistency")

        return denoise


def make(
    discretization: PartSpec,
    schedule: PartSpec = "edm",
    parameterization: PartSpec = "consistency",
    time_sampler: PartSpec = "karras",
    weighting: Literal["one", "inverse_step"] = "inverse_step",
    metric: Literal["l2", "pseudo_huber"] = "pseudo_huber",
    huber: float = 0.00054,
    target: Literal["student", "average"] = "student",
    sigma_min: float = 0.002,
    solver: Solver | None = None,
    guidance: float = 1.0,
    teacher: Teacher | None = None,
    joint_teacher: Mapping[str, Any] | None = None,
) -> ConsistencyObjective:
    """A consistency model in discrete time; the table at the head of the file has what the papers choose.

    Args:
      discretization: of `diffusion.discretization`: which two times are held equal, and how that changes over training.
      schedule: the path.
      parameterization: one whose x0 is x / alpha at the level `sigma_min`: `consistency` with the same sigma_min; edm,
        v or velocity with `sigma_min = 0`.
      time_sampler: the law of t, before the discretization moves it to a point of its grid.
      weighting: of the distance: 1, or 1 / (t - r), in levels sigma / alpha, or in times where the schedule ends in
        pure noise.
      metric: mean square `l2`; or `pseudo_huber`, sqrt(mean square + huber^2) - huber, which is the paper's over the
        root of the number of dimensions.
      huber: c of the pseudo-Huber metric, for each dimension's root.
      target: what the earlier point is given to: the `student` as it is, or an `average` of it with the discretization's
        decay; no gradient goes there.
      sigma_min: the level of the boundary, where a path ends.
      solver: how the earlier point is found: None takes the one of the same noise, `ddim`, `euler` and `heun` a step
        along the teacher's ODE.
      guidance: of the teacher, by a scale as in `guidance.cfg`.
      teacher: a trained model on the same schedule, whose weights the student begins with and whose ODE a solver
        follows.
      joint_teacher: in place of a teacher, the section of an objective (`{"name": "denoising", ...}`) that trains one in the same
        run, on the student's schedule; a solver follows its average.
    """
    parts = build_parts(schedule, parameterization, time_sampler, "simple")
    path = parts["schedule"]
    if huber <= 0:
        raise InputError("huber", f"must be positive, got {huber}")
    if sigma_min < 0:
        raise InputError("sigma_min", f"must be at least 0, got {sigma_min}")
    if teacher is not None and joint_teacher is not None:
        raise InputError("joint_teacher", "trains a teacher, and there is one already; remove it or the teacher")
    trained = None
    if joint_teacher is not None:
        if solver is None:
            raise InputError("solver", "is None, and the teacher would be trained for nothing; use heun")
        if "schedule" in joint_teacher:
            raise InputError("beside.schedule", "is the student's; remove it")
        trained = build("objectives", {"schedule": schedule, **joint_teacher}, field="joint_teacher")
    elif solver is not None or teacher is not None:
        check_teacher(teacher, path)
    if guidance != 1 and (teacher is None or not teacher.cond_drop_rate):
        raise InputError("guidance", "needs a teacher that was trained with train.cond_drop_rate above 0; use 1")
    t_min = _boundary(path, sigma_min)
    row = parts["parameterization"](path, jnp.float32(t_min))
    if row.c_out != 0 or row.c_skip != 1 / path.alpha(jnp.float32(t_min)):
        raise InputError("parameterization", f"x0 is not x at sigma_min = {sigma_min}, c_skip is {row.c_skip:.4g} and "
                         f"c_out {row.c_out:.4g}; use consistency with the same sigma_min, or edm, v or velocity "
                         "with sigma_min = 0")  # fmt: skip
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
    """The last time whose level sigma / alpha is not above sigma_min, in float32 however it is rounded."""
    if sigma_min == 0:
        return 0.0
    t = np.float32(schedule.time(jnp.float32(-2 * np.log(sigma_min))))
    while not schedule.sigma(jnp.float32(t)) < np.float32(sigma_min) * schedule.alpha(jnp.float32(t)):
        t = np.nextafter(t, np.float32(0))
    return float(t)
