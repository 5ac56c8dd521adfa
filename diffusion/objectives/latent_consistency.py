"""Latent consistency distillation (LCM; Luo et al. 2023, arXiv 2310.04378): a student is taught in one step where
classifier-free guidance takes its teacher, over many steps of the table at a time, and is told the guidance's scale.

"Latent" is where the paper uses it; nothing here goes by what the examples are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp

from diffusion.core.arrays import expand, flat_mean
from diffusion.core.types import Apply, Array, Batch, Cond, Denoised, Denoiser, InputError, Network, Params
from diffusion.objectives.base.gaussian import Gaussian, PartSpec, build_parts, corrupt
from diffusion.objectives.base.teacher import Teacher, begin, check_coefficients, check_teacher

SCHEDULE: PartSpec = {"name": "vp", "betas": "scaled_linear"}  # of the models that the paper distils
SIGMA_DATA = 0.5  # of the boundary's scalings; the paper's for any data


@dataclasses.dataclass(frozen=True)
class LatentConsistency(Gaussian):
    """See `make`. The dict of networks is `{"net", "target", "teacher"}`."""

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
        net = begin(params["net"], teacher["net"])
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
        """The target follows the student as the step before left it."""
        decay = self.target_decay
        target = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, params["target"], params["net"])
        return {**params, "target": target}, objective_state

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        """Also the scale of each example's guidance, `guidance [B]`."""
        key, key_guidance = jax.random.split(key)
        low, high = self.guidance
        scale = jax.random.uniform(key_guidance, batch["x"].shape[:1], minval=low, maxval=high)
        return {**super().draw(batch, key, step, objective_state), "guidance": scale}

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        noise = batch["draws"]
        t, scale, cond = noise["t"], noise["guidance"], batch["cond"]
        s = jnp.maximum(t - self.skip / self.schedule.num_steps, 0)
        x_t = corrupt(self.schedule, batch["x"], noise["eps"], t)
        fixed = jax.lax.stop_gradient(params)
        x_s = self.solved(self.teacher.denoiser(fixed["teacher"]), x_t, t, s, cond, scale)
        # One key for both: what dropout leaves out is the same, and the difference is that of the two points.
        told = {**cond, "guidance_scale": scale}
        target = self.end(net, fixed["target"], x_s, s, told, key)
        square = jnp.square(self.end(net, params["net"], x_t, t, told, key) - target)
        if self.metric == "pseudo_huber":
            square /= jnp.sqrt(square + self.huber**2) + self.huber  # sqrt(square + c^2) - c, exact near 0
        return noise["weight"] * flat_mean(square), {}

    def solved(self, denoise: Denoiser, x_t: Array, t: Array, s: Array, cond: Cond, scale: Array) -> Array:
        """x at s by one step of DDIM from t, both `[B]`, guided by `scale [B]`. An example without its condition goes
        unguided."""
        dropped = denoise(x_t, t, {**cond, "keep": jnp.zeros(t.shape, bool)}).x0
        x0 = dropped + expand(scale, x_t) * (denoise(x_t, t, cond).x0 - dropped)
        alpha, sigma = expand(self.schedule.alpha(t), x_t), expand(self.schedule.sigma(t), x_t)
        return corrupt(self.schedule, x0, (x_t - alpha * x0) / sigma, s)

    def end(self, net: Apply, params: Params, x: Array, t: Array, cond: Cond, key: Array | None = None) -> Array:
        """f(x, t) = c_skip x + c_out x0, where the path through x at t `[B]` ends; x bit for bit at t = 0. The scalings
        are those of the paper's appendix, in steps of the table."""
        row = self.parameterization(self.schedule, t)
        # Of no account where c_out is 0, but 0 times what a network makes of an infinite number is none.
        c_noise = jnp.where(jnp.isfinite(row.c_noise), row.c_noise, 0)
        x0 = row.to_x0(net(params, expand(row.c_in, x) * x, c_noise, cond, key=key), x)
        scaled = expand(self.timestep_scaling * self.schedule.num_steps * t, x) / SIGMA_DATA
        return x / (scaled**2 + 1) + scaled / jnp.sqrt(scaled**2 + 1) * x0

    def denoiser(self, net: Apply, params: Mapping) -> Denoiser:
        """f at the scale `cond["guidance_scale"]`, 1 where there is none."""

        def denoise(x: Array, t: Array, cond: Cond) -> Denoised:
            told = {"guidance_scale": jnp.ones(x.shape[:1], jnp.float32), **cond}
            return Denoised(self.end(net, params["net"], x, jnp.broadcast_to(t, x.shape[:1]), told), kind="consistency")

        return denoise


def make(
    schedule: PartSpec = SCHEDULE,
    parameterization: PartSpec = "eps",
    skip: int = 20,
    ddim_steps: int = 50,
    guidance: tuple[float, float] = (3.0, 15.0),
    target_decay: float = 0.95,
    timestep_scaling: float = 10.0,
    metric: Literal["l2", "pseudo_huber"] = "pseudo_huber",
    huber: float = 0.001,
    teacher: Teacher | None = None,
) -> LatentConsistency:
    """Latent consistency distillation; the scale convention is `guidance.cfg`'s, the paper's w + 1.

    Args:
      schedule: one with a table of steps.
      parameterization: the teacher's.
      skip: steps of the table from t to s, where the student at t is held to the target at s.
      ddim_steps: t is one of so many even times, up to 1; `skip` leads from one to another.
      guidance: the lowest and the highest scale that the student learns; the default is the paper's w from 2 to 14.
      target_decay: of the target network, an average of the student.
      timestep_scaling: of the boundary's scalings: larger comes down to t = 0 more steeply.
      metric: mean square `l2`; or `pseudo_huber`, the mean of sqrt(difference^2 + huber^2) - huber.
      huber: c of the pseudo-Huber metric.
      teacher: a trained model on the same schedule, whose weights the student begins with. It must know what to do
        without its condition.
    """
    if ddim_steps < 1:
        raise InputError("ddim_steps", f"must be at least 1, got {ddim_steps}")
    parts = build_parts(schedule, parameterization, {"name": "discrete", "num_steps": ddim_steps}, "simple")
    table = getattr(parts["schedule"], "num_steps", None)
    if table is None:
        raise InputError("schedule.name", "needs a table of steps; use vp")
    if not 1 <= skip <= table or skip * ddim_steps % table:
        raise InputError("skip", f"must be a multiple of num_steps / ddim_steps = {table / ddim_steps:g} of at most "
                         f"{table}, got {skip}")  # fmt: skip
    low, high = guidance
    if not 0 <= low <= high:
        raise InputError("guidance", f"must be two scales of at least 0, the lower first, got {guidance}")
    if not 0 <= target_decay < 1:
        raise InputError("target_decay", f"must be in [0, 1), got {target_decay}")
    for name, value in (("timestep_scaling", timestep_scaling), ("huber", huber)):
        if value <= 0:
            raise InputError(name, f"must be positive, got {value}")
    check_teacher(teacher, parts["schedule"])
    check_coefficients(teacher, parts["schedule"], parts["parameterization"])
    if not teacher.cond_drop_rate:
        raise InputError("teacher", "was trained with train.cond_drop_rate = 0, so it cannot be guided; train one with "
                         "a rate above 0")  # fmt: skip
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
