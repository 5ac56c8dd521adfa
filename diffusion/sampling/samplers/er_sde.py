"""ER-SDE-Solver: an extended reverse SDE, solved in sigma / alpha (Cui et al. 2023, arXiv 2309.06169, algorithm 3).

With y = x / alpha, u = sigma / alpha, phi(u) the noise scale function, r = phi(u_s) / phi(u_t), and x0(u) the
polynomial through the values at the last `order` points:

    y_s = r y_t + phi(u_s)  integral from u_s to u_t of phi'(u) / phi(u)^2 x0(u) du + sqrt(u_s^2 - r^2 u_t^2) z

For order 1 the integral is (1 - r) x0 (eq. 14). phi(u) = u is the ODE, and phi(u) = u^2 the reverse SDE. The default of
the authors, which adds less noise than the SDE at high levels and more than it at low ones, is

    phi(u) = u (exp(u^0.3) + 10)                                                                     (ER-SDE 5, table 1)

The published code integrates the corrections of orders 2 and 3 by a sum of 200 terms; here it is Gauss' quadrature.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffusion.core.arrays import derivative, normal
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import Solver
from diffusion.sampling.ode.multistep import History, quadrature_weights, weighted_differences


def noise_scale(u: Array) -> Array:
    """Returns phi(u)."""
    return u * (jnp.exp(u**0.3) + 10)


@dataclasses.dataclass(frozen=True)
class ERSDE(Solver):
    """Interpolates x0 in sigma / alpha. A step from pure noise, and one to the data, is of first order."""

    order: int = 3
    stochastic = True

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        return {"history": History.empty(self.order, x, times)}

    def step(
        self, x: Array, state: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, dict]:
        x0 = denoise(x, t).x0.astype(x.dtype)
        u, end = (jnp.exp(-schedule.log_snr(time) / 2) for time in (t, s))
        history = state["history"].push(x0, u)
        regular = jnp.isfinite(u) & (end > 0) & (end != u)
        # Levels that `regular` excludes are replaced, so that all terms are finite.
        start, level = jnp.where(regular, u, 1), jnp.where(regular, end, 0.5)
        length = level - start
        ratio = noise_scale(level) / noise_scale(start)

        def kernel(tau: Array) -> Array:
            inner = start + tau * length
            return noise_scale(level) * derivative(noise_scale, inner) / noise_scale(inner) ** 2 * -length

        count = jnp.where(regular, history.count, 1)
        valid = (jnp.arange(self.order) < count) & jnp.isfinite(history.nodes)
        weights = quadrature_weights((history.nodes - start) / length, valid, kernel)
        # At both infinite ends r is 0, except for a step of length 0, where it is 1.
        ratio = jnp.where(regular, ratio, jnp.where(end == u, 1, 0))
        scaled = ratio * jnp.where(jnp.isfinite(u), u, 0)  # r u_t
        fresh = jnp.sqrt(jnp.maximum(end**2 - scaled**2, 0)) * normal(keys, x.shape[1:], x.dtype)
        alpha_s, sigma_t = schedule.alpha(s), schedule.sigma(t)
        moved = (1 - ratio) * x0 + weighted_differences(history.values, weights) + fresh
        return (alpha_s * (scaled / sigma_t * x + moved)).astype(x.dtype), x0, {"history": history}


def make(order: int = 3) -> ERSDE:
    """Makes the ER-SDE sampler, with one evaluation per step.

    Args:
      order: 1, 2 or 3: the number of interpolated values.
    """
    if not 1 <= order <= 3:
        raise InputError("order", f"must be 1, 2 or 3, got {order}")
    return ERSDE(order)
