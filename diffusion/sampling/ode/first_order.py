"""What solvers share: the first-order step, and the coordinates in which higher-order ones see the ODE."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffusion.core.arrays import derivative, expand
from diffusion.core.types import Array, Denoised, InputError, Schedule

CoordinateName = Literal["noise_level", "time"] | None


class Solver:
    """The base of samplers: a solver of the ODE with one evaluation a step, whose carry is a dict with x in it."""

    stochastic = False
    uses_separate_eps = False

    def evaluations(self, steps: int) -> int | None:
        return steps

    def finish(self, carry: Mapping[str, Any]) -> Array:
        return carry["x"]


class OneStep(Solver):
    """The base of samplers that carry x and nothing else."""

    def init(self, x: Array, times: Array) -> Array:
        return x

    def finish(self, x: Array) -> Array:
        return x


def first_order(schedule: Schedule, x: Array, denoised: Denoised, t: Array, s: Array) -> Array:
    """x_s with x0 and the noise held: `alpha_s x0 + sigma_s eps`, which is DDIM (Song, Meng & Ermon 2021, arXiv
    2010.02502, eq. 12) and Euler's step of y = x / alpha in sigma / alpha. Finite for every s, and for every t but
    0."""
    alpha_t, alpha_s, ratio = schedule.alpha(t), schedule.alpha(s), schedule.sigma(s) / schedule.sigma(t)
    if denoised.x0_for_eps is not None:
        return ratio * (x - alpha_t * denoised.x0_for_eps) + alpha_s * denoised.x0
    return ratio * x + (alpha_s - alpha_t * ratio) * denoised.x0


def eps_of(schedule: Schedule, x: Array, x0: Array, t: Array) -> Array:
    """The noise in x_t if the data are x0, at t `[]` or `[B]`; 0 at t = 0, where there is none."""
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    return jnp.where(sigma > 0, (x - alpha * x0) / jnp.where(sigma > 0, sigma, 1), 0)


def half_log_snr(schedule: Schedule, t: Array) -> Array:
    """log(alpha / sigma), in which exponential integrators step."""
    return schedule.log_snr(t) / 2


@dataclasses.dataclass(frozen=True)
class NoiseLevel:
    """y = x / alpha against u = sigma / alpha: dy/du is the noise (Karras et al. 2022, arXiv 2206.00364, eq. 3)."""

    schedule: Schedule

    def at(self, t: Array) -> Array:
        return self.schedule.sigma(t) / self.schedule.alpha(t)

    def time(self, u: Array) -> Array:
        return self.schedule.time(-2 * jnp.log(u))

    def slope(self, x: Array, x0: Array, t: Array) -> Array:
        return eps_of(self.schedule, x, x0, t)

    def move(self, x: Array, slope: Array, t: Array, s: Array) -> Array:
        """x_s, if y goes along `slope` from t to s."""
        alpha_t, alpha_s = self.schedule.alpha(t), self.schedule.alpha(s)
        return alpha_s / alpha_t * x + (self.schedule.sigma(s) - self.schedule.sigma(t) * alpha_s / alpha_t) * slope

    def middle(self, t: Array, s: Array) -> Array:
        """The time halfway in log(sigma / alpha)."""
        return self.schedule.time((self.schedule.log_snr(t) + self.schedule.log_snr(s)) / 2)


@dataclasses.dataclass(frozen=True)
class Time:
    """x against t: dx/dt = alpha' x0 + sigma' eps is the velocity (Lipman et al. 2023, arXiv 2210.02747)."""

    schedule: Schedule

    def at(self, t: Array) -> Array:
        return t

    def time(self, u: Array) -> Array:
        return u

    def slope(self, x: Array, x0: Array, t: Array) -> Array:
        d_alpha, d_sigma = derivative(self.schedule.alpha, t), derivative(self.schedule.sigma, t)
        return d_alpha * x0 + d_sigma * eps_of(self.schedule, x, x0, t)

    def move(self, x: Array, slope: Array, t: Array, s: Array) -> Array:
        return x + (s - t) * slope

    def middle(self, t: Array, s: Array) -> Array:
        return (t + s) / 2


def coordinate(name: CoordinateName, schedule: Schedule) -> NoiseLevel | Time:
    """A coordinate by name. By default the noise level, but the time where the schedule ends in pure noise, whose noise
    level is infinite."""
    pure = ends_in_noise(schedule)
    if name == "noise_level" and pure:
        raise InputError("sampler.coordinate", "noise_level is infinite at t = 1 of this schedule; use time")
    return Time(schedule) if name == "time" or (name is None and pure) else NoiseLevel(schedule)


def ends_in_noise(schedule: Schedule) -> bool:
    """Whether alpha is 0 at t = 1. A schedule whose parameters are being traced (a learned one) never is."""
    with jax.ensure_compile_time_eval():
        alpha = schedule.alpha(jnp.float32(1))
        return not isinstance(alpha, jax.core.Tracer) and bool(alpha == 0)
