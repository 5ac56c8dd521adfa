"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512, algorithm 2): a student learns to do in one DDIM step
what its teacher does in two, becomes the teacher, and so on until a few steps are left."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion.core.arrays import expand
from diffusion.core.types import Apply, Array, Batch, InputError, Params
from diffusion.objectives.base.gaussian import PartSpec, build_parts, corrupt
from diffusion.objectives.base.rounds import Rounds
from diffusion.objectives.base.teacher import Teacher
from diffusion.sampling.ode.first_order import eps_of, first_order

COSINE = {"name": "vp", "betas": "cosine"}


@dataclasses.dataclass(frozen=True)
class ProgressiveDistillation(Rounds):
    """See `make`."""

    start_steps: int = 1
    continuous: bool = False

    def student_steps(self, step: Array) -> Array:
        """N, the steps from noise to data of the student that a training step is for."""
        return jnp.right_shift(self.start_steps, self.round_of(step))

    def before_step(
        self,
        params: Mapping,
        ema_params: Mapping,
        batch: Batch,
        objective_state: Mapping[str, Array],
        key: Array,
        step: Array,
    ) -> tuple[dict[str, Params], Mapping[str, Array]]:
        params, objective_state = super().before_step(params, ema_params, batch, objective_state, key, step)
        net = jax.lax.cond(self.hands_over(step), lambda: params["teacher"]["net"], lambda: params["net"])
        return {**params, "net": net}, objective_state

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        noise = super().draw(batch, key, step, objective_state)
        if not self.continuous:
            steps = self.student_steps(step)
            noise["t"] = jnp.ceil(noise["t"] * steps) / steps
        return noise

    def target(self, params: Mapping, x_t: Array, t: Array, cond: Mapping[str, Array], step: Array) -> Array:
        """The x0 `[B, ...]` with which one step from t `[B]` takes x_t where two of the teacher's take it.

        A step is r x + (alpha_s - r alpha_t) x0 with r = sigma_s / sigma_t, and so are two: this x0 is the mean of the
        teacher's two answers, weighted with their factors. In this form no images that are nearly equal are subtracted,
        and neither end divides by 0. Within half a step of the data the teacher's first step is its last, and its
        answer the target.
        """
        half = 0.5 / self.student_steps(step)
        middle = jnp.where(t > half, t - half, t)
        s = jnp.maximum(t - 2 * half, 0)
        alpha_t, alpha_m, alpha_s = (self.schedule.alpha(time) for time in (t, middle, s))
        sigma_t, sigma_m, sigma_s = (self.schedule.sigma(time) for time in (t, middle, s))
        second = alpha_s - sigma_s / sigma_m * alpha_m
        both = alpha_s - sigma_s / sigma_t * alpha_t

        denoise = self.teacher.denoiser(params["teacher"])
        first_x0 = denoise(x_t, t, cond)
        x_m = first_order(self.schedule, x_t, first_x0, expand(t, x_t), expand(middle, x_t))
        second_x0 = denoise(x_m, middle, cond).x0
        return first_x0.x0 + expand(second / both, x_t) * (second_x0 - first_x0.x0)

    def loss(
        self, net: Apply, params: Mapping, ema_params: Mapping, batch: Batch, key: Array | None, step: Array
    ) -> tuple[Array, dict[str, Array]]:
        noise = batch["draws"]
        x_t = corrupt(self.schedule, batch["x"], noise["eps"], noise["t"])
        x0 = jax.lax.stop_gradient(self.target(params, x_t, noise["t"], batch["cond"], step))
        # The example and the noise that the student is to see in x_t: of these it is a denoising loss like any other.
        seen = Batch(x=x0, cond=batch["cond"], draws={**noise, "eps": eps_of(self.schedule, x_t, x0, noise["t"])})
        loss, metrics = super().loss(net, params, ema_params, seen, key, step)
        return loss, {**metrics, "student_steps": jnp.float32(self.student_steps(step))}


def make(
    start_steps: int,
    round_steps: int,
    end_steps: int = 1,
    schedule: PartSpec = COSINE,
    parameterization: PartSpec = "v",
    weighting: PartSpec = "truncated_snr",
    continuous: bool = False,
    teacher: Teacher | None = None,
) -> ProgressiveDistillation:
    """Rounds that each halve the number of sampling steps, from `start_steps` to `end_steps`. At the end of one, the
    average of the student's weights (the config's last) becomes the teacher and the student of the next. Sample with
    `ddim` on the `trailing` grid, in as many steps as the last round's.

    t is spread evenly over the batch, uniform for each example.

    Args:
      start_steps: of the first round's student, `end_steps` times a power of two; the teacher takes twice as many.
      round_steps: training steps of each round; `train.steps` is to be this times the number of rounds, and
        `optimizer.cycles` the number of rounds.
      end_steps: of the last round's student.
      schedule, parameterization: the teacher's. With `v` or `x0` the student's one step from pure noise exists.
      weighting: any; `truncated_snr` is the paper's, for which a weight of 0 at t = 1 will not do.
      continuous: train at all t in (0, 1] and not only at the N times i / N of the student's own steps, from t to
        t - 1/N or, nearer to the data, to 0. The student may then also be sampled in other numbers of steps than
        `end_steps`: that of the one-step round is trained at t = 1 alone otherwise.
      teacher: in a config the workdir of a trained model.
    """
    if end_steps < 1:
        raise InputError("end_steps", f"must be at least 1, got {end_steps}")
    halvings = max(start_steps // end_steps, 1).bit_length() - 1
    if start_steps != end_steps << halvings:
        raise InputError("start_steps", f"must be end_steps = {end_steps} times a power of two, got {start_steps}")
    parts = build_parts(schedule, parameterization, "stratified", weighting)
    return ProgressiveDistillation(
        **parts, teacher=teacher, rounds=halvings + 1, round_steps=round_steps, start_steps=start_steps,
        continuous=continuous,
    )  # fmt: skip
