"""The first-order step, and the coordinates in which higher-order solvers integrate the probability-flow ODE."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from diffusion.core.arrays import derivative, expand
from diffusion.core.types import Array, Denoised, InputError, Schedule

CoordinateName = Literal["noise_level", "time"] | None


class Solver:
    """Base class of samplers: an ODE solver with one evaluation per step. Subclasses define `init` and `step`."""

    stochastic = False
    uses_separate_eps = False
    elementwise = False
    few_step = False  # whether it is for models of few steps, whose x0 is not a posterior mean
    brownian = False

    def evaluations(self, steps: int, to_data: bool = True) -> int | None:
        return steps

    def time(self, state: Any, t: Array) -> Array:
        return t

    def replace(self, state: Any, old: Array, new: Array) -> Any:
        return state


class OneStep(Solver):
    """Base class of samplers without a state. Subclasses define `step`, which returns the state that it receives."""

    def init(self, x: Array, times: Array, index: Array | int = 0) -> tuple[()]:
        return ()


def first_order(schedule: Schedule, x: Array, denoised: Denoised, t: Array, s: Array) -> Array:
    """Returns x_s = alpha_s x0 + sigma_s eps for constant x0 and eps = (x_t - alpha_t x0) / sigma_t.

    This is DDIM (Song, Meng & Ermon 2021, arXiv 2010.02502, eq. 12), and the Euler step of y = x / alpha in
    u = sigma / alpha. It is finite for every s and for every t except 0.
    """
    alpha_t, alpha_s, ratio = schedule.alpha(t), schedule.alpha(s), schedule.sigma(s) / schedule.sigma(t)
    if denoised.x0_for_eps is not None:
        return ratio * (x - alpha_t * denoised.x0_for_eps) + alpha_s * denoised.x0
    return ratio * x + (alpha_s - alpha_t * ratio) * denoised.x0


def eps_of(schedule: Schedule, x: Array, x0: Array, t: Array) -> Array:
    """Returns the noise eps = (x_t - alpha_t x0) / sigma_t, for t as in `expand`; 0 where sigma_t is 0."""
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    return jnp.where(sigma > 0, (x - alpha * x0) / jnp.where(sigma > 0, sigma, 1), 0)


def x0_of_eps(denoised: Denoised) -> Array:
    """Returns the x0 from which eps is computed."""
    return denoised.x0 if denoised.x0_for_eps is None else denoised.x0_for_eps


def half_log_snr(schedule: Schedule, t: Array) -> Array:
    """Returns lambda_t = log(alpha_t / sigma_t), the time variable of exponential integrators."""
    return schedule.log_snr(t) / 2


@dataclasses.dataclass(frozen=True)
class NoiseLevel:
    """The ODE of y = x / alpha in u = sigma / alpha: dy/du = eps (Karras et al. 2022, arXiv 2206.00364, eq. 3)."""

    schedule: Schedule

    def from_time(self, t: Array) -> Array:
        """Returns u at time t."""
        return self.schedule.sigma(t) / self.schedule.alpha(t)

    def time(self, u: Array) -> Array:
        """Returns the time t at u, the inverse of `from_time`."""
        return self.schedule.time(-2 * jnp.log(u))

    def slope(self, x: Array, x0: Array, t: Array) -> Array:
        """Returns the right-hand side of the ODE at x_t, given the denoiser's x0."""
        return eps_of(self.schedule, x, x0, t)

    def move(self, x: Array, slope: Array, t: Array, s: Array) -> Array:
        """Returns x_s for a constant slope from t to s."""
        alpha_t, alpha_s = self.schedule.alpha(t), self.schedule.alpha(s)
        return alpha_s / alpha_t * x + (self.schedule.sigma(s) - self.schedule.sigma(t) * alpha_s / alpha_t) * slope

    def midpoint(self, t: Array, s: Array) -> Array:
        """Returns the time halfway between t and s in log(sigma / alpha)."""
        return self.schedule.time((self.schedule.log_snr(t) + self.schedule.log_snr(s)) / 2)


@dataclasses.dataclass(frozen=True)
class Time:
    """The ODE of x in t: dx/dt = alpha' x0 + sigma' eps, the velocity (Lipman et al. 2023, arXiv 2210.02747).

    The methods are those of `NoiseLevel`, with u = t.
    """

    schedule: Schedule

    def from_time(self, t: Array) -> Array:
        return t

    def time(self, u: Array) -> Array:
        return u

    def slope(self, x: Array, x0: Array, t: Array) -> Array:
        d_alpha, d_sigma = derivative(self.schedule.alpha, t), derivative(self.schedule.sigma, t)
        return d_alpha * x0 + d_sigma * eps_of(self.schedule, x, x0, t)

    def move(self, x: Array, slope: Array, t: Array, s: Array) -> Array:
        return x + (s - t) * slope

    def midpoint(self, t: Array, s: Array) -> Array:
        """Returns the time halfway between t and s."""
        return (t + s) / 2


def coordinate(name: CoordinateName, schedule: Schedule) -> NoiseLevel | Time:
    """Returns the coordinate of this name.

    None selects the noise level, or the time if the schedule ends in pure noise, where the noise level is infinite.

    Raises:
      InputError: `noise_level` with a schedule that ends in pure noise.
    """
    pure = ends_in_noise(schedule)
    if name == "noise_level" and pure:
        raise InputError(
            "sampler.coordinate", "must be 'time' for this schedule, whose noise level is infinite at t = 1"
        )
    return Time(schedule) if name == "time" or (name is None and pure) else NoiseLevel(schedule)


def ends_in_noise(schedule: Schedule) -> bool:
    """Returns whether alpha is 0 at t = 1; False for a schedule with traced parameters (a learned schedule)."""
    with jax.ensure_compile_time_eval():
        alpha = schedule.alpha(jnp.float32(1))
        return not isinstance(alpha, jax.core.Tracer) and bool(alpha == 0)
