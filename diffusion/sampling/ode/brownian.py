"""A virtual Brownian tree: noise that is a function of the times and the key, consistent under refinement of a grid.

The exact solution of the reverse SDE (`exponential`) adds e^(lambda_s) sqrt(1 - e^(-2h)) z to
e^(lambda_s) x_s / sigma_s in a step from t to s. This is the increment from v_t to v_s of a Brownian motion W in the
clock v = alpha^2 / sigma^2, the signal-to-noise ratio:

    z(t, s) = (W(v_s) - W(v_t)) / sqrt(v_s - v_t)

z(t, s) is standard normal and independent for intervals that do not overlap. That of two adjacent intervals determines
that of their union, so that runs with different grids follow the same path. W is evaluated by bisection of the times
(Li et al. 2020, arXiv 2001.01328, section 4): the value at the middle of an interval follows the Brownian bridge
between its ends, with noise from the key that belongs to the interval.
"""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import fold, normal
from diffusion.core.types import Array, Schedule

_DEPTH = 24  # bisections, down to intervals of 2^-24 in t
_ROOT = np.uint32(2**32 - 2)  # folded into the keys of a path; `prior` and the steps of `loop` use small numbers


def path_noise(keys: Array, schedule: Schedule, t: Array, s: Array, x: Array) -> Array:
    """Returns z(t, s) of the module's docstring, `[B, ...]` like x, for t > s > 0; 0 for t = s.

    Args:
      keys: one key per sample, which selects the path; the same for all intervals.
    """
    keys = fold(keys, _ROOT)
    length = _clock(schedule, s) - _clock(schedule, t)
    usable = (length > 0) & jnp.isfinite(length)
    difference = _path(keys, schedule, s, x) - _path(keys, schedule, t, x)
    return jnp.where(usable, difference / jnp.sqrt(jnp.where(usable, length, 1)), 0).astype(x.dtype)


def _clock(schedule: Schedule, t: Array) -> Array:
    """Returns v, which is infinite at t = 0."""
    return jnp.exp(schedule.log_snr(t))


def _path(keys: Array, schedule: Schedule, t: Array, x: Array) -> Array:
    """Returns W(v_t) - W(v_1), `[B, ...]`, for a scalar t > 0."""

    def between(low: Array, high: Array, w_low: Array, w_high: Array, time: Array, node: Array) -> Array:
        """Draws W at `time` given W at the times `low` and `high` around it."""
        begin, end, inner = (_clock(schedule, ends) for ends in (high, low, time))
        passed = jnp.clip(inner - begin, 0, end - begin)  # rounding may put the clock of the inner time outside
        share = jnp.where(end > begin, passed / jnp.where(end > begin, end - begin, 1), 0)
        noise = normal(fold(keys, node), x.shape[1:], x.dtype)
        return w_high + share * (w_low - w_high) + jnp.sqrt(passed * (1 - share)) * noise

    def bisect(_: Array, carry: tuple) -> tuple:
        low, high, w_low, w_high, node = carry
        middle = (low + high) / 2
        w_middle = between(low, high, w_low, w_high, middle, node)
        above = t >= middle
        low, high = jnp.where(above, middle, low), jnp.where(above, high, middle)
        w_low, w_high = jnp.where(above, w_middle, w_low), jnp.where(above, w_high, w_middle)
        return low, high, w_low, w_high, 2 * node + above.astype(node.dtype)

    zero, one = jnp.zeros((), t.dtype), jnp.ones((), t.dtype)
    start = zero, one, jnp.zeros_like(x), jnp.zeros_like(x), jnp.uint32(1)
    *ends, node = jax.lax.fori_loop(0, _DEPTH, bisect, start)
    return between(*ends, t, node)
