"""Heun's method, and with churn the stochastic sampler of EDM (Karras et al. 2022, arXiv 2206.00364, algorithm 2)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import CoordinateName, NoiseLevel, Solver, coordinate, first_order


@dataclasses.dataclass(frozen=True)
class Heun(Solver):
    """Second order: the slope is the mean of those at both ends. The last step, to sigma = 0, is Euler's."""

    churn: float = 0.0
    s_min: float = 0.0
    s_max: float = float("inf")
    s_noise: float = 1.0
    coordinate: CoordinateName = None

    @property
    def stochastic(self) -> bool:
        return self.churn > 0

    def evaluations(self, steps: int) -> int:
        return 2 * steps - 1

    def init(self, x: Array, times: Array) -> dict[str, Any]:
        return {"x": x, "raise": jnp.asarray(min(self.churn / (len(times) - 1), 2**0.5 - 1), times.dtype)}

    def step(self, carry: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> dict:
        x = carry["x"]
        if self.churn:
            x, t = self._churned(x, schedule, t, keys, carry["raise"])
        path = coordinate(self.coordinate, schedule)
        denoised = denoise(x, t)
        slope = path.slope(x, denoised.x0, t)
        held = path.move(x, slope, t, s)

        def second_order() -> Array:
            return path.move(x, (slope + path.slope(held, denoise(held, s).x0, s)) / 2, t, s)

        x = jax.lax.cond(schedule.sigma(s) > 0, second_order, lambda: first_order(schedule, x, denoised, t, s))
        return {**carry, "x": x}

    def _churned(self, x: Array, schedule: Schedule, t: Array, keys: Array, more: Array) -> tuple[Array, Array]:
        """x with noise added up to a higher level, if the level is within [s_min, s_max], and the time it is then at.
        The level stays within the schedule."""
        path = NoiseLevel(schedule)
        level = path.at(t)
        raised = jnp.minimum(level * (1 + more), path.at(jnp.ones_like(t)))
        raised = jnp.where((level >= self.s_min) & (level <= self.s_max), raised, level)
        fresh = self.s_noise * jnp.sqrt(jnp.maximum(raised**2 - level**2, 0))
        higher = jnp.where(raised > level, jnp.clip(path.time(raised), t, 1), t)
        alpha = schedule.alpha(higher)
        noise = normal(keys, x.shape[1:], x.dtype)
        return jnp.where(raised > level, alpha / schedule.alpha(t) * x + alpha * fresh * noise, x), higher


def make(
    churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    coordinate: CoordinateName = None,
) -> Heun:
    """Two evaluations a step, one in the last.

    Args:
      churn: noise put back, S_churn of the paper: a step from sigma starts at (1 + churn / steps) sigma, at most
        sqrt(2) sigma. 0 is the deterministic method.
      s_min, s_max: the levels sigma / alpha between which it is put back.
      s_noise: its standard deviation, slightly above 1 to make up for what a network takes out.
      coordinate: what the ODE is read in: `noise_level` (x / alpha against sigma / alpha) or `time` (x against t).
        Default: `time` where the schedule ends in pure noise (flows), else `noise_level`.
    """
    if churn < 0:
        raise InputError("churn", f"must be at least 0, got {churn}")
    if not 0 <= s_min <= s_max:
        raise InputError("s_min", f"must be at least 0 and at most s_max = {s_max}, got {s_min}")
    if s_noise <= 0:
        raise InputError("s_noise", f"must be positive, got {s_noise}")
    return Heun(churn, s_min, s_max, s_noise, coordinate)
