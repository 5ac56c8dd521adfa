"""PNDM (Liu et al. 2022, arXiv 2202.09778): fourth-order Adams-Bashforth with the weights of even steps, on eps.

With e_0 the newest evaluation of eps, e_k the one k steps before it, and phi(x, e, t, s) the DDIM step of x_t with the
noise e, the paper's transfer part:

    e'  = (55 e_0 - 59 e_1 + 37 e_2 - 9 e_3) / 24                                          (linear multistep)
    x_s = phi(x_t, e', t, s)

F-PNDM obtains the first three e' by pseudo Runge-Kutta steps (eq. 13). With m = (t + s) / 2:

    e1 = eps(x_t, t),    e2 = eps(phi(x_t, e1, t, m), m),    e3 = eps(phi(x_t, e2, t, m), m)
    e4 = eps(phi(x_t, e3, t, s), s),    e' = (e1 + 2 e2 + 2 e3 + e4) / 6

PLMS instead takes e' = (eps(x_t, t) + eps(phi(x_t, eps, t, s), s)) / 2 in the first step, and Adams-Bashforth of orders
2 and 3 in the next two.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.types import Array, Denoiser, Schedule
from diffusion.sampling.ode.first_order import NoiseLevel, Solver, Time, coordinate
from diffusion.sampling.ode.multistep import History

# Weights of the newest slope, the one before it, and so on, for orders 1 to 4.
_ADAMS_BASHFORTH = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


@dataclasses.dataclass(frozen=True)
class PNDM(Solver):
    """A fourth-order multistep method for even steps of t."""

    prk: bool = False

    def evaluations(self, steps: int, to_data: bool = True) -> int:
        starting = min(steps - to_data, 3 if self.prk else 1)
        return steps + (3 if self.prk else 1) * starting

    def init(self, x: Array, times: Array, index: Array | int = 0) -> dict[str, Any]:
        return {"history": History.empty(4, x, times)}

    def step(
        self, x: Array, state: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, dict]:
        ode, x0, known = coordinate(None, schedule), denoise(x, t).x0, state["history"].count
        slope = ode.slope(x, x0, t)
        history = state["history"].push(slope, t)

        def starting_slope() -> Array:
            if self.prk:
                return _runge_kutta(ode, denoise, x, slope, t, s)
            return (slope + _slope_at(ode, denoise, ode.move(x, slope, t, s), s)) / 2

        def multistep_slope() -> Array:
            weights = jnp.asarray(_ADAMS_BASHFORTH, x.dtype)[jnp.minimum(known, 3)]
            return jnp.tensordot(weights, history.values, 1)

        # The model has no slope at the data, where a step takes the slopes that are known.
        starts = (known < (3 if self.prk else 1)) & (schedule.sigma(s) > 0)
        mean = jax.lax.cond(starts, starting_slope, multistep_slope)
        return ode.move(x, mean, t, s), x0, {"history": history}


def _slope_at(ode: NoiseLevel | Time, denoise: Denoiser, x: Array, t: Array) -> Array:
    return ode.slope(x, denoise(x, t).x0, t)


def _runge_kutta(ode: NoiseLevel | Time, denoise: Denoiser, x: Array, slope: Array, t: Array, s: Array) -> Array:
    """Returns the slope of the paper's pseudo Runge-Kutta step (eq. 13), whose midpoint is that of t."""
    m = (t + s) / 2
    second = _slope_at(ode, denoise, ode.move(x, slope, t, m), m)
    third = _slope_at(ode, denoise, ode.move(x, second, t, m), m)
    fourth = _slope_at(ode, denoise, ode.move(x, third, t, s), s)
    return (slope + 2 * second + 2 * third + fourth) / 6


def make(prk: bool = False) -> PNDM:
    """Makes the PNDM sampler, with one evaluation per step after the first ones.

    The grid must have even steps of t (`leading`, `trailing`), for which the weights are derived.

    Args:
      prk: whether to start with three pseudo Runge-Kutta steps of four evaluations (the paper's F-PNDM). If False, the
        first step has two evaluations, as in latent diffusion (PLMS).
    """
    return PNDM(prk)
