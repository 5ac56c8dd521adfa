"""An adaptive Runge-Kutta method for reference solutions, with a step size per sample.

It is Dormand & Prince's embedded pair of orders 5 and 4 (1980), as in SciPy's `RK45`. With z = x / sqrt(alpha^2 +
sigma^2), r = log(alpha / sigma) and c^2 = alpha^2 / (alpha^2 + sigma^2), the ODE has no pole at either end and is the
same on every schedule:

    dz/dr = f(z, r) = c (x0 - c z)
    k_1 = f(z, r),    k_i = f(z + h sum_j a_ij k_j, r + c_i h),    z' = z + h sum_i b_i k_i
    error = h sum_i (b_i - b*_i) k_i
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks
from diffusion.core.arrays import expand, flat_mean
from diffusion.core.types import Array, Denoiser, Schedule
from diffusion.sampling.ode.first_order import OneStep, first_order

# The Butcher tableau: c_i and a_ij for i = 2 to 7, of which the last row also is b (order 5), and b* (order 4).
_C = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_A = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_B_FOURTH = (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)

MOST_ATTEMPTS = 10_000  # between two times of the grid


@dataclasses.dataclass(frozen=True)
class RK45(OneStep):
    """Solves the ODE adaptively from t to s, for each sample with its own step sizes.

    A sample is NaN if the model's output is not finite on its path, or if MOST_ATTEMPTS steps, accepted or rejected, do
    not suffice.
    """

    rtol: float = 1e-4
    atol: float = 1e-4
    sigma_min: float = 0.002

    def evaluations(self, steps: int, to_data: bool = True) -> None:
        return None

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        # Outside of [-12, -log(sigma_min)] a first-order step is practically exact: its error decreases with the square
        # of the noise level.
        r_max, r_min = -np.log(self.sigma_min), -12.0
        times = jnp.array([t, s])
        r = jnp.clip(schedule.log_snr(times) / 2, r_min, r_max)
        inner = jnp.where(jnp.abs(schedule.log_snr(times) / 2 - r) < 1e-6, times, schedule.time(2 * r))

        def jump(x: Array, t: Array, s: Array) -> Array:
            def first_order_step() -> Array:
                return first_order(schedule, x, denoise(x, t), t, s)

            return jax.lax.cond((t != s) & (schedule.sigma(t) > 0), first_order_step, lambda: x)

        x = jump(x, t, inner[0])
        x, x0 = self._solve(x, denoise, schedule, r[0], r[1])
        return jump(x, inner[1], s), x0, state

    def _solve(self, x: Array, denoise: Denoiser, schedule: Schedule, start: Array, end: Array) -> tuple[Array, Array]:
        """Solves the ODE from r = `start` to r = `end`, and returns x there and x0 at the start."""

        def scale(r: Array) -> Array:
            t = schedule.time(2 * r)
            return jnp.sqrt(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2)

        def slope(z: Array, r: Array) -> Array:
            t = schedule.time(2 * r)
            c = expand(jnp.sqrt(jax.nn.sigmoid(2 * r)), z)
            return c * (denoise(expand(scale(r), z) * z, t).x0 - c * z)

        def attempt(state: tuple) -> tuple:
            z, k1, r, h, active, count = state
            h = jnp.where(active, jnp.clip(h, -jnp.abs(end - r), jnp.abs(end - r)), 0)
            k = [k1]
            for c, row in zip(_C, _A, strict=True):
                stage = z + expand(h, z) * sum(a * slope for a, slope in zip(row, k, strict=True) if a)
                k.append(slope(stage, r + c * h))
            # The last stage is the solution of order 5, and its slope is k1 of the next step.
            b_fifth = (*_A[-1], 0)
            b_error = [b - b_fourth for b, b_fourth in zip(b_fifth, _B_FOURTH, strict=True)]
            error = expand(h, z) * sum(b * slope for b, slope in zip(b_error, k, strict=True) if b)
            allowed = self.atol + self.rtol * jnp.maximum(jnp.abs(z), jnp.abs(stage))
            ratio = jnp.sqrt(flat_mean((error / allowed) ** 2))
            # A step whose size is near the rounding error of r is accepted whatever its error is. If the model's output
            # is not finite there either, neither is the sample.
            finite, smallest = jnp.isfinite(ratio), jnp.abs(h) < 1e3 * jnp.finfo(r.dtype).eps
            failed = active & smallest & ~finite
            accepted = active & ((ratio <= 1) | smallest)
            h_new = h * jnp.where(finite, jnp.clip(0.9 * jnp.maximum(ratio, 1e-10) ** -0.2, 0.2, 10), 0.2)
            r_new = jnp.where(accepted, r + h, r)
            z = jnp.where(expand(failed, z), jnp.nan, jnp.where(expand(accepted, z), stage, z))
            k1 = jnp.where(expand(accepted, z), k[-1], k1)
            return z, k1, r_new, h_new, ~failed & (jnp.abs(end - r_new) > 1e-6), count + 1

        r = jnp.broadcast_to(start, x.shape[:1])
        z = x / expand(scale(r), x)
        h = jnp.broadcast_to((end - start) / 8, r.shape)
        k1 = slope(z, r).astype(z.dtype)
        c = expand(jnp.sqrt(jax.nn.sigmoid(2 * r)), z)
        x0 = k1 / c + c * z
        state = (z, k1, r, h, jnp.abs(end - r) > 1e-6, jnp.int32(0))
        unfinished = lambda state: jnp.any(state[-2]) & (state[-1] < MOST_ATTEMPTS)  # noqa: E731
        z, *_, active, _ = jax.lax.while_loop(unfinished, attempt, state)
        z = jnp.where(expand(active, z), jnp.nan, z)
        return (expand(scale(jnp.broadcast_to(end, r.shape)), z) * z).astype(x.dtype), x0


def make(rtol: float = 1e-4, atol: float = 1e-4, sigma_min: float = 0.002) -> RK45:
    """Makes the adaptive sampler. The grid only sets the times at which x is returned; use few steps.

    Args:
      rtol, atol: tolerances. The root mean square over a sample of a step's error stays below `atol + rtol |x|`.
      sigma_min: the level sigma / alpha below which the solution is replaced by the denoiser's x0. The models of most
        papers are not trained below 0.002.
    """
    checks.positive(rtol=rtol, atol=atol, sigma_min=sigma_min)
    return RK45(rtol, atol, sigma_min)
