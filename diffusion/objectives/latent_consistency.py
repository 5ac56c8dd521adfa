"""Latent consistency distillation (LCM; Luo et al. 2023, arXiv 2310.04378).

The student learns to do in one step what its teacher, under classifier-free guidance, does over many steps of the
table. It is conditioned on the guidance scale. The paper applies the method to latents; this implementation makes no
assumption about the data.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import expand, flat_mean, per_example
from diffusion.core.types import Apply, Array, Batch, Cond, Denoised, Denoiser, InputError, Network, Params
from diffusion.objectives.base.gaussian import Gaussian, ParameterizationSpec, ScheduleSpec, build_parts, corrupt
from diffusion.objectives.base.teacher import Teacher, check_coefficients, check_teacher, init_from_teacher

SCHEDULE: ScheduleSpec = {"name": "vp", "betas": "scaled_linear"}  # the schedule of the paper's teachers
SAMPLER = {"name": "lcm", "steps": 4}  # of a config without a sampler
SIGMA_DATA = 0.5  # of the boundary scalings; the paper uses this value for all data


@dataclasses.dataclass(frozen=True)
class LatentConsistency(Gaussian):
    """Latent consistency distillation; see `make`. The dict of networks has `net`, `target` and `teacher`."""

    skip: int = 20
    guidance: tuple[float, float] = (3.0, 15.0)
    target_decay: float = 0.95
    timestep_scaling: float = 10.0
    metric: Literal["l2", "pseudo_huber"] = "pseudo_huber"
    huber: float = 0.001
    teacher: Teacher | None = None

    @property
    def scalar_conditions(self) -> tuple[str, ...]:
        return ("guidance_scale",)

    def init(self, network: Network, key: Array, teacher: Mapping | None = None) -> dict[str, Params]:
        params = super().init(network, key)
        teacher = self.teacher.init(key) if teacher is None else teacher
        net = init_from_teacher(params["net"], teacher["net"])
        return {"net": net, "target": jax.tree.map(jnp.array, net), "teacher": teacher}

    def before_step(
        self,
        params: Mapping,
        ema_params: Mapping,
        batch: Batch,
        objective_state: Mapping[str, Array],
        key: Array,
        step: Array,
    ) -> tuple[dict[str, Params], Mapping[str, Array]]:
        """Updates the target with the student of the previous step."""
        decay = self.target_decay
        target = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, params["target"], params["net"])
        return {**params, "target": target}, objective_state

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        """Draws as the base class does, and adds the guidance scale of each example, `guidance [B]`."""
        key, key_guidance = jax.random.split(key)
        low, high = self.guidance
        scale = jax.random.uniform(key_guidance, batch["x"].shape[:1], minval=low, maxval=high)
        return {**super().draw(batch, key, step, objective_state), "guidance": scale}

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        draws = batch["draws"]
        t, scale, cond = draws["t"], draws["guidance"], batch["cond"]
        s = jnp.maximum(t - self.skip / self.schedule.num_steps, 0)
        x_t = corrupt(self.schedule, batch["x"], draws["eps"], t)
        fixed = jax.lax.stop_gradient(params)
        x_s = self.guided_ddim_step(self.teacher.denoiser(fixed["teacher"]), x_t, t, s, cond, scale)
        # Both evaluations use the same dropout key, so that they differ only by the two points.
        cond = {**cond, "guidance_scale": scale}
        target = self.consistency_function(net, fixed["target"], x_s, s, cond, key)
        square = jnp.square(self.consistency_function(net, params["net"], x_t, t, cond, key) - target)
        if self.metric == "pseudo_huber":
            # sqrt(square + c^2) - c, in a form without cancellation near 0
            square /= jnp.sqrt(square + self.huber**2) + self.huber
        return draws["weight"] * flat_mean(square), {}

    def guided_ddim_step(self, denoise: Denoiser, x_t: Array, t: Array, s: Array, cond: Cond, scale: Array) -> Array:
        """Returns x at s after one DDIM step from t, both `[B]`, guided by `scale [B]`.

        An example whose condition is dropped is not guided.
        """
        dropped = denoise(x_t, t, {**cond, "keep": jnp.zeros(t.shape, bool)}).x0
        x0 = dropped + expand(scale, x_t) * (denoise(x_t, t, cond).x0 - dropped)
        alpha, sigma = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        return corrupt(self.schedule, x0, (x_t - alpha * x0) / sigma, s)

    def consistency_function(
        self, net: Apply, params: Params, x: Array, t: Array, cond: Cond, key: Array | None = None
    ) -> Array:
        """Returns f(x, t) = c_skip x + c_out x0, the end of the path through x at t `[B]`; it is x bit for bit at t =
        0.

        The scalings are those of the paper's appendix, with t in steps of the table.
        """
        coefficients = self.parameterization(self.schedule, t)
        # Where the noise label is infinite, c_out is 0. The network must still be finite, since 0 times NaN is NaN.
        c_noise = jnp.where(jnp.isfinite(coefficients.c_noise), coefficients.c_noise, 0)
        x0 = coefficients.to_x0(net(params, expand(coefficients.c_in, x) * x, c_noise, cond, key=key), x)
        scaled = expand(self.timestep_scaling * self.schedule.num_steps * t, x) / SIGMA_DATA
        return x / (scaled**2 + 1) + scaled / jnp.sqrt(scaled**2 + 1) * x0

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        """Returns f as a denoiser, at the scale `cond["guidance_scale"]`, or 1 if that is absent."""

        def denoise(x: Array, t: Array, cond: Cond) -> Denoised:
            cond = {"guidance_scale": jnp.ones(x.shape[:1], jnp.float32), **cond}
            t = per_example(t, x)
            return Denoised(self.consistency_function(net, params["net"], x, t, cond), kind="consistency")

        return denoise


def make(
    schedule: ScheduleSpec = SCHEDULE,
    parameterization: ParameterizationSpec = "eps",
    skip: int = 20,
    ddim_steps: int = 50,
    guidance: tuple[float, float] = (3.0, 15.0),
    target_decay: float = 0.95,
    timestep_scaling: float = 10.0,
    metric: Literal["l2", "pseudo_huber"] = "pseudo_huber",
    huber: float = 0.001,
    teacher: Teacher | None = None,
) -> LatentConsistency:
    """Builds latent consistency distillation. Guidance scales are those of `guidance.cfg`, the paper's w + 1.

    Args:
      schedule: A schedule with a table of steps.
      parameterization: The parameterization of the teacher.
      skip: The number of steps of the table from t to s, where the student at t is matched to the target at s.
      ddim_steps: The number of evenly spaced values of t, up to 1; `skip` leads from one to another.
      guidance: The lowest and the highest scale that the student learns; the default is the paper's w from 2 to 14.
      target_decay: The EMA decay of the target network, an average of the student.
      timestep_scaling: The scaling of t in the boundary scalings; larger values make them steeper near t = 0.
      metric: The distance: the mean square `l2`, or `pseudo_huber`, the mean of sqrt(difference^2 + huber^2) - huber.
      huber: The constant c of the pseudo-Huber metric.
      teacher: A trained model on the same schedule, whose weights the student starts from. It must have been trained
        with dropped conditions.
    """
    checks.at_least(1, ddim_steps=ddim_steps)
    parts = build_parts(schedule, parameterization, {"name": "discrete", "num_steps": ddim_steps}, "simple")
    table = getattr(parts["schedule"], "num_steps", None)
    if table is None:
        raise InputError("schedule.name", "must be a schedule with a table of steps; use vp")
    if not 1 <= skip <= table or skip * ddim_steps % table:
        raise InputError("skip", f"must be a multiple of num_steps / ddim_steps = {table / ddim_steps:g} of at most "
                         f"{table}, got {skip}")  # fmt: skip
    low, high = guidance
    if not 0 <= low <= high:
        raise InputError("guidance", f"must be two scales of at least 0, the lower first, got {guidance}")
    checks.rate(target_decay=target_decay)
    checks.positive(timestep_scaling=timestep_scaling, huber=huber)
    check_teacher(teacher, parts["schedule"])
    check_coefficients(teacher, parts["schedule"], parts["parameterization"])
    if not teacher.cond_drop_rate:
        raise InputError("teacher", "must be trained with train.cond_drop_rate above 0, so that it can be guided")
    return LatentConsistency(
        **parts,
        frozen=("target", "teacher"),
        skip=skip,
        guidance=guidance,
        target_decay=target_decay,
        timestep_scaling=timestep_scaling,
        metric=metric,
        huber=huber,
        teacher=teacher,
    )
