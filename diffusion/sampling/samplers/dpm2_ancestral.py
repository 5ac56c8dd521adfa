"""`dpm2` with noise put back at each step (k-diffusion's `dpm_2_ancestral`)."""

import dataclasses

import jax
import jax.numpy as jnp

from diffusion.core.arrays import normal
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep, eps_of, first_order


@dataclasses.dataclass(frozen=True)
class DPM2Ancestral(OneStep):
    """A midpoint step down to sigma_down, then noise of sigma_up. The last step, to sigma = 0, is Euler's."""

    eta: float = 1.0

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def evaluations(self, steps: int) -> int:
        return 2 * steps - 1

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        denoised = denoise(x, t)

        def ancestral() -> Array:
            level_t, level_s = jnp.exp(-schedule.log_snr(t) / 2), jnp.exp(-schedule.log_snr(s) / 2)
            share = self.eta**2 * (1 - (level_s / level_t) ** 2)
            up, down = level_s * jnp.sqrt(share), level_s * jnp.sqrt(1 - share)
            # From pure noise, whose level is infinite, the step has no middle: it is Euler's.
            finite = jnp.isfinite(level_t)
            middle = schedule.time(-jnp.log(jnp.where(finite, level_t, level_s)) - jnp.log(down))
            half_way = first_order(schedule, x, denoised, t, middle)
            eps_middle = eps_of(schedule, half_way, denoise(half_way, middle).x0, middle)
            eps = eps_of(schedule, x, denoised.x0, t)
            bent = jnp.where(finite, jnp.where(finite, down - level_t, 0) * (eps_middle - eps), 0)
            alpha_s = schedule.alpha(s)
            return alpha_s * (denoised.x0 + down * eps + bent + up * normal(keys, x.shape[1:], x.dtype))

        return jax.lax.cond(schedule.sigma(s) > 0, ancestral, lambda: first_order(schedule, x, denoised, t, s))


def make(eta: float = 1.0) -> DPM2Ancestral:
    """Two evaluations a step, one in the last.

    Args:
      eta: the share of the noise, in [0, 1]; 0 is `dpm2` in the noise level.
    """
    if not 0 <= eta <= 1:
        raise InputError("eta", f"must be in [0, 1], got {eta}")
    return DPM2Ancestral(eta)
