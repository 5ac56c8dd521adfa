"""The `dpm2` sampler with fresh noise after each step: k-diffusion's `dpm_2_ancestral`.

With y = x / alpha, u = sigma / alpha and m the time at which log u_m = (log u_t + log u_down) / 2:

    u_up^2 = eta^2 u_s^2 (1 - u_s^2 / u_t^2),    u_down^2 = u_s^2 - u_up^2
    y_m = y_t + (u_m - u_t) eps(x_t, t)
    y_s = y_t + (u_down - u_t) eps(x_m, m) + u_up z
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep, eps_of, first_order


@dataclasses.dataclass(frozen=True)
class DPM2Ancestral(OneStep):
    """A midpoint step to u_down, followed by noise of u_up. The last step, to sigma = 0, is an Euler step."""

    eta: float = 1.0

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def evaluations(self, steps: int, to_data: bool = True) -> int:
        return 2 * steps - to_data

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        denoised = denoise(x, t)

        def ancestral() -> Array:
            u_t, u_s = jnp.exp(-schedule.log_snr(t) / 2), jnp.exp(-schedule.log_snr(s) / 2)
            share = self.eta**2 * (1 - (u_s / u_t) ** 2)
            up, down = u_s * jnp.sqrt(share), u_s * jnp.sqrt(1 - share)
            # A step from pure noise, where u_t is infinite, has no midpoint and is an Euler step.
            finite = jnp.isfinite(u_t)
            m = schedule.time(-jnp.log(jnp.where(finite, u_t, u_s)) - jnp.log(down))
            x_m = first_order(schedule, x, denoised, t, m)
            eps_m = eps_of(schedule, x_m, denoise(x_m, m).x0, m)
            eps = eps_of(schedule, x, denoised.x0, t)
            # y_t + (down - u_t) eps_m, written around x0 = y_t - u_t eps, which is finite where u_t is not.
            correction = jnp.where(finite, jnp.where(finite, down - u_t, 0) * (eps_m - eps), 0)
            alpha_s = schedule.alpha(s)
            return alpha_s * (denoised.x0 + down * eps + correction + up * normal(keys, x.shape[1:], x.dtype))

        # Neither has a step to pure noise, as in an inversion.
        regular = (schedule.sigma(s) > 0) & (schedule.alpha(s) > 0)
        moved = jax.lax.cond(regular, ancestral, lambda: first_order(schedule, x, denoised, t, s))
        return moved, denoised.x0, state


def make(eta: float = 1.0) -> DPM2Ancestral:
    """Makes the ancestral midpoint sampler, with two evaluations per step and one in the last.

    Args:
      eta: the fraction of the noise, in [0, 1]; 0 is `dpm2` in the noise level.
    """
    if not 0 <= eta <= 1:
        raise InputError("eta", f"must be in [0, 1], got {eta}")
    return DPM2Ancestral(eta)
