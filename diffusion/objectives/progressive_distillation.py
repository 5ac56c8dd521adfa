"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512, algorithm 2): a student learns to do in one DDIM step
what its teacher does in two, and then becomes the teacher of the next round, until a few steps remain."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import expand
from diffusion.core.types import Apply, Array, Batch, Cond, InputError, Params
from diffusion.objectives.base.gaussian import ParameterizationSpec, ScheduleSpec, WeightingSpec, build_parts, corrupt
from diffusion.objectives.base.rounds import Rounds
from diffusion.objectives.base.teacher import Teacher
from diffusion.sampling.ode.first_order import eps_of, first_order

COSINE = {"name": "vp", "betas": "cosine"}


@dataclasses.dataclass(frozen=True)
class ProgressiveDistillation(Rounds):
    """Progressive distillation; see `make`."""

    start_steps: int = 1
    continuous: bool = False

    def student_steps(self, step: Array) -> Array:
        """Returns N, the number of sampling steps of the student that is trained at a training step."""
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
        net = jax.lax.cond(self.starts_new_round(step), lambda: params["teacher"]["net"], lambda: params["net"])
        return {**params, "net": net}, objective_state

    def draw(self, batch: Batch, key: Array, step: Array, objective_state: Mapping[str, Array]) -> dict[str, Array]:
        draws = super().draw(batch, key, step, objective_state)
        if not self.continuous:
            steps = self.student_steps(step)
            draws["t"] = jnp.ceil(draws["t"] * steps) / steps
        return draws

    def target(self, params: Mapping, x_t: Array, t: Array, cond: Cond, step: Array) -> Array:
        """Returns the x0 `[B, ...]` for which one step from t `[B]` arrives where two steps of the teacher do.

        A step is r x + (alpha_s - r alpha_t) x0 with r = sigma_s / sigma_t, and two steps have the same form. Therefore
        this x0 is the mean of the teacher's two estimates, weighted by their factors. This form does not subtract
        nearly equal images, and it does not divide by 0 at either end. If t is within half a step of the data, the
        teacher's first step is its last, and its estimate is the target.
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
        draws = batch["draws"]
        x_t = corrupt(self.schedule, batch["x"], draws["eps"], draws["t"])
        x0 = jax.lax.stop_gradient(self.target(params, x_t, draws["t"], batch["cond"], step))
        # The loss is the denoising loss of the target x0 and the noise that goes with it in x_t.
        draws = {**draws, "eps": eps_of(self.schedule, x_t, x0, draws["t"])}
        batch = Batch(x=x0, cond=batch["cond"], draws=draws)
        loss, metrics = super().loss(net, params, ema_params, batch, key, step)
        return loss, {**metrics, "student_steps": jnp.float32(self.student_steps(step))}


def make(
    start_steps: int,
    round_steps: int,
    end_steps: int = 1,
    schedule: ScheduleSpec = COSINE,
    parameterization: ParameterizationSpec = "v",
    weighting: WeightingSpec = "truncated_snr",
    continuous: bool = False,
    teacher: Teacher | None = None,
) -> ProgressiveDistillation:
    """Builds progressive distillation: each round halves the number of sampling steps, from `start_steps` to
    `end_steps`.

    At the end of a round, the average of the student's weights (the last in the config) becomes the teacher and the
    student of the next round. Sample with `ddim` on the `trailing` grid, in the number of steps of the last round.

    t is stratified over the batch and uniform for each example.

    Args:
      start_steps: The number of sampling steps of the first student, `end_steps` times a power of two; the teacher
        takes twice as many.
      round_steps: The number of training steps per round. Set `train.steps` to this times the number of rounds, and
        `optimizer.cycles` to the number of rounds.
      end_steps: The number of sampling steps of the last student.
      schedule, parameterization: Those of the teacher. With `v` or `x0` the student's single step from pure noise
        exists.
      weighting: Any weighting; the paper uses `truncated_snr`. The weight must not be 0 at t = 1.
      continuous: Whether to train at all t in (0, 1] instead of at the N times i / N of the student's steps. A step
        then leads from t to t - 1/N, or to 0 if that is nearer. Such a student can also be sampled in other numbers of
        steps than `end_steps`, whereas the student of a one-step round is otherwise trained at t = 1 alone.
      teacher: A trained model; in a config, its workdir.
    """
    checks.at_least(1, end_steps=end_steps)
    halvings = max(start_steps // end_steps, 1).bit_length() - 1
    if start_steps != end_steps << halvings:
        raise InputError("start_steps", f"must be end_steps = {end_steps} times a power of two, got {start_steps}")
    parts = build_parts(schedule, parameterization, "stratified", weighting)
    return ProgressiveDistillation(
        **parts, teacher=teacher, rounds=halvings + 1, round_steps=round_steps, start_steps=start_steps,
        continuous=continuous,
    )  # fmt: skip
