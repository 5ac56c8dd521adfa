"""SDE-DPM-Solver++ with an inner point, and the noise of a Brownian path: k-diffusion's `dpmpp_sde`.

With y = x / alpha, u = sigma / alpha, m the time at which log u_m = (log u_t + log u_s) / 2, and W the Brownian path:

    u_up(s)^2 = eta^2 u_s^2 (1 - u_s^2 / u_t^2),    u_down(s)^2 = u_s^2 - u_up(s)^2
    y_m = (u_down(m) / u_t) y_t + (1 - u_down(m) / u_t) x0(x_t, t) + u_up(m) z(t, m)
    y_s = (u_down(s) / u_t) y_t + (1 - u_down(s) / u_t) x0(x_m, m) + u_up(s) z(t, s)

z(t, m) and z(t, s) are increments of W (`diffusion.sampling.ode.brownian`), so that they are correlated. For eta = 1
this is the second-order singlestep solver of the reverse SDE (Lu et al. 2022, arXiv 2211.01095, section 4 and app. B).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import fold
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.brownian import path_noise
from diffusion.sampling.ode.first_order import Solver, first_order


@dataclasses.dataclass(frozen=True)
class DPMSolverPPSDE(Solver):
    """Evaluates x0 at an inner point of each step. The last step, to sigma = 0, is an Euler step."""

    eta: float = 1.0
    s_noise: float = 1.0
    brownian = True

    @property
    def stochastic(self) -> bool:
        return self.eta > 0

    def evaluations(self, steps: int, to_data: bool = True) -> int:
        return 2 * steps - to_data

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        return {"first": jnp.int32(index)}  # the path is another one where the solver restarts

    def step(
        self, x: Array, state: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, dict]:
        denoised = denoise(x, t)

        def move(x0: Array, s: Array) -> Array:
            """Returns x at time s for a constant x0 from t to s."""
            level = jnp.exp(-schedule.log_snr(s) / 2)
            ratio = level * jnp.exp(schedule.log_snr(t) / 2)  # 0 if t is pure noise
            share = self.eta**2 * (1 - ratio**2)
            down, up = level * jnp.sqrt(1 - share), level * jnp.sqrt(jnp.maximum(share, 0))
            noise = self.s_noise * up * path_noise(fold(keys, state["first"]), schedule, t, s, x) if self.eta else 0
            kept = down / schedule.sigma(t)  # down / u_t = kept alpha_t
            return schedule.alpha(s) * (kept * x + (1 - kept * schedule.alpha(t)) * x0 + noise)

        def second_order() -> Array:
            # A step from pure noise has no inner point in log(sigma), and is of first order.
            finite = jnp.isfinite(schedule.log_snr(t))
            m = schedule.time((jnp.where(finite, schedule.log_snr(t), schedule.log_snr(s)) + schedule.log_snr(s)) / 2)
            x0 = denoise(move(denoised.x0, m), m).x0
            return move(jnp.where(finite, x0, denoised.x0), s).astype(x.dtype)

        def last() -> Array:
            return first_order(schedule, x, denoised, t, s).astype(x.dtype)

        return jax.lax.cond(schedule.sigma(s) > 0, second_order, last), denoised.x0, state


def make(eta: float = 1.0, s_noise: float = 1.0) -> DPMSolverPPSDE:
    """Makes the SDE sampler with an inner point, with two evaluations per step and one in the last.

    Args:
      eta: the fraction of the noise, in [0, 1]: 1 is the reverse SDE, 0 the singlestep solver of the ODE.
      s_noise: the standard deviation of the added noise.
    """
    if not 0 <= eta <= 1:
        raise InputError("eta", f"must be in [0, 1], got {eta}")
    checks.positive(s_noise=s_noise)
    return DPMSolverPPSDE(eta, s_noise)
