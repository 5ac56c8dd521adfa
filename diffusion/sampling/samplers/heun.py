"""Heun's method, and with churn the stochastic sampler of EDM (Karras et al. 2022, arXiv 2206.00364, algorithm 2).

With y = x / alpha and u = sigma / alpha (algorithm 2 has alpha = 1 and t = sigma):

    gamma = min(S_churn / N, sqrt(2) - 1) if S_tmin <= u_t <= S_tmax, else 0
    u_hat = (1 + gamma) u_t,    y_hat = y_t + sqrt(u_hat^2 - u_t^2) S_noise z
    d     = eps(y_hat, u_hat)
    y'    = y_hat + (u_s - u_hat) d
    y_s   = y_hat + (u_s - u_hat) (d + eps(y', u_s)) / 2

Without churn this is algorithm 1.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import CoordinateName, NoiseLevel, Solver, coordinate, first_order


@dataclasses.dataclass(frozen=True)
class Heun(Solver):
    """A second-order method. The last step, to sigma = 0, is an Euler step."""

    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = float("inf")
    s_noise: float = 1.0
    coordinate: CoordinateName = None

    @property
    def stochastic(self) -> bool:
        return self.churn > 0

    def evaluations(self, steps: int, to_data: bool = True) -> int:
        return 2 * steps - to_data

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        return {"gamma": jnp.asarray(min(self.churn / (len(times) - 1), 2**0.5 - 1), times.dtype)}

    def step(
        self, x: Array, state: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, dict]:
        if self.churn:
            x, t = self._add_noise(x, schedule, t, keys, state["gamma"])
        ode = coordinate(self.coordinate, schedule)
        denoised = denoise(x, t)
        slope = ode.slope(x, denoised.x0, t)
        euler = ode.move(x, slope, t, s)

        def second_order() -> Array:
            return ode.move(x, (slope + ode.slope(euler, denoise(euler, s).x0, s)) / 2, t, s)

        x = jax.lax.cond(schedule.sigma(s) > 0, second_order, lambda: first_order(schedule, x, denoised, t, s))
        return x, denoised.x0, state

    def _add_noise(self, x: Array, schedule: Schedule, t: Array, keys: Array, gamma: Array) -> tuple[Array, Array]:
        """Returns x and t at the level (1 + gamma) u_t, which does not exceed the schedule's highest."""
        ode = NoiseLevel(schedule)
        level = ode.from_time(t)
        raised = jnp.minimum(level * (1 + gamma), ode.from_time(jnp.ones_like(t)))
        raised = jnp.where((level >= self.s_min) & (level <= self.s_max), raised, level)
        fresh = self.s_noise * jnp.sqrt(jnp.maximum(raised**2 - level**2, 0))
        t_hat = jnp.where(raised > level, jnp.clip(ode.time(raised), t, 1), t)
        alpha = schedule.alpha(t_hat)
        noise = normal(keys, x.shape[1:], x.dtype)
        return jnp.where(raised > level, alpha / schedule.alpha(t) * x + alpha * fresh * noise, x), t_hat


def make(
    churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    coordinate: CoordinateName = None,
) -> Heun:
    """Makes Heun's sampler, with two evaluations per step and one in the last.

    Args:
      churn: S_churn of the paper, the amount of added noise: a step from sigma starts at (1 + churn / steps) sigma, at
        most at sqrt(2) sigma. 0 is the deterministic method.
      s_min, s_max: S_tmin and S_tmax, the levels sigma / alpha between which noise is added.
      s_noise: S_noise, the standard deviation of the added noise, slightly above 1 to compensate for the noise that a
        network removes in excess.
      coordinate: the variables in which the ODE is solved: `noise_level` (x / alpha against sigma / alpha) or `time` (x
        against t). By default `time` for schedules that end in pure noise (flows), otherwise `noise_level`.
    """
    checks.at_least(0, churn=churn)
    if not 0 <= s_min <= s_max:
        raise InputError("s_min", f"must be at least 0 and at most s_max = {s_max}, got {s_min}")
    checks.positive(s_noise=s_noise)
    return Heun(churn, s_min, s_max, s_noise, coordinate)
