"""An adaptive Runge-Kutta method, for reference runs: Dormand & Prince's embedded pair of orders 5 and 4 (1980), as
SciPy's `RK45`, with a step size for each sample."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand, flat_mean
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep, first_order

_NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_ROWS = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_FOURTH = (5179 / 57600, 0, 7571 / 16695, 393 / 640, -92097 / 339200, 187 / 2100, 1 / 40)


@dataclasses.dataclass(frozen=True)
class RK45(OneStep):
    """Solves for z = x / sqrt(alpha^2 + sigma^2) in r = log(alpha / sigma), where the ODE has no pole at either end
    and on every schedule is dz/dr = c (x0 - c z), c^2 = alpha^2 / (alpha^2 + sigma^2)."""

    rtol: float = 1e-4
    atol: float = 1e-4
    sigma_min: float = 0.002

    def evaluations(self, steps: int) -> None:
        return None

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        # Beyond +-limit a step of first order is as good as exact: what it leaves out falls with the square of the
        # level.
        ends = -np.log(self.sigma_min), 12.0
        near = jnp.array([t, s])
        r = jnp.clip(schedule.log_snr(near) / 2, -ends[1], ends[0])
        inner = jnp.where(jnp.abs(schedule.log_snr(near) / 2 - r) < 1e-6, near, schedule.time(2 * r))

        def jump(x: Array, t: Array, s: Array) -> Array:
            def held() -> Array:
                return first_order(schedule, x, denoise(x, t), t, s)

            return jax.lax.cond((t != s) & (schedule.sigma(t) > 0), held, lambda: x)

        x = jump(x, t, inner[0])
        x = self._solve(x, denoise, schedule, r[0], r[1])
        return jump(x, inner[1], s)

    def _solve(self, x: Array, denoise: Denoiser, schedule: Schedule, start: Array, end: Array) -> Array:
        def scale(r: Array) -> Array:
            t = schedule.time(2 * r)
            return jnp.sqrt(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2)

        def slope(z: Array, r: Array) -> Array:
            t = schedule.time(2 * r)
            c = expand(jnp.sqrt(jax.nn.sigmoid(2 * r)), z)
            return c * (denoise(expand(scale(r), z) * z, t).x0 - c * z)

        def attempt(state: tuple) -> tuple:
            z, k1, r, h, active = state
            h = jnp.where(active, jnp.clip(h, -jnp.abs(end - r), jnp.abs(end - r)), 0)
            k = [k1]
            for node, row in zip(_NODES, _ROWS, strict=True):
                there = z + expand(h, z) * sum(a * slope for a, slope in zip(row, k, strict=True) if a)
                k.append(slope(there, r + node * h))
            # `there` is the solution of order 5, and the last slope the next step's first.
            fifth = (*_ROWS[-1], 0)
            error = expand(h, z) * sum((b - c) * slope for b, c, slope in zip(fifth, _FOURTH, k, strict=True) if b - c)
            allowed = self.atol + self.rtol * jnp.maximum(jnp.abs(z), jnp.abs(there))
            ratio = jnp.sqrt(flat_mean((error / allowed) ** 2))
            # A step at the limit of rounding is taken as it is.
            taken = active & ((ratio <= 1) | (jnp.abs(h) < 1e3 * jnp.finfo(r.dtype).eps))
            grown = h * jnp.clip(0.9 * jnp.maximum(ratio, 1e-10) ** -0.2, 0.2, 10)
            r_new = jnp.where(taken, r + h, r)
            z = jnp.where(expand(taken, z), there, z)
            k1 = jnp.where(expand(taken, z), k[-1], k1)
            return z, k1, r_new, grown, jnp.abs(end - r_new) > 1e-6

        r = jnp.broadcast_to(start, x.shape[:1])
        z = x / expand(scale(r), x)
        h = jnp.broadcast_to((end - start) / 8, r.shape)
        state = (z, slope(z, r).astype(z.dtype), r, h, jnp.abs(end - r) > 1e-6)
        z, *_ = jax.lax.while_loop(lambda state: jnp.any(state[-1]), attempt, state)
        return (expand(scale(jnp.broadcast_to(end, r.shape)), z) * z).astype(x.dtype)


def make(rtol: float = 1e-4, atol: float = 1e-4, sigma_min: float = 0.002) -> RK45:
    """The grid says only where results are wanted between; take few steps.

    Args:
      rtol, atol: the error of a step is held below `atol + rtol |x|`, in the mean square over a sample.
      sigma_min: the level sigma / alpha at which the way to t = 0 is cut short by the denoiser's x0. The models of most
        papers are not trained below 0.002.
    """
    for name, value in (("rtol", rtol), ("atol", atol), ("sigma_min", sigma_min)):
        if not value > 0:
            raise InputError(name, f"must be positive, got {value}")
    return RK45(rtol, atol, sigma_min)
