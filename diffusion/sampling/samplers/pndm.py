"""PNDM (Liu et al. 2022, arXiv 2202.09778): Adams-Bashforth of fourth order with the weights of even steps, on the
noise."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.types import Array, Denoiser, Schedule
from diffusion.sampling.ode.first_order import NoiseLevel, Solver, Time, coordinate
from diffusion.sampling.ode.multistep import History, check_steps

# Weights of the newest slope, the one before it, ...: orders 1 to 4.
_ADAMS = np.array([[24, 0, 0, 0], [36, -12, 0, 0], [46, -32, 10, 0], [55, -59, 37, -9]]) / 24


@dataclasses.dataclass(frozen=True)
class PNDM(Solver):
    prk: bool = False

    def evaluations(self, steps: int) -> int:
        return steps + (9 if self.prk else 1)

    def init(self, x: Array, times: Array) -> dict[str, Any]:
        check_steps(times, 4)
        return {"x": x, "history": History.empty(4, x, times), "index": jnp.int32(0)}

    def step(self, carry: dict, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> dict:
        x, index, path = carry["x"], carry["index"], coordinate(None, schedule)
        slope = path.slope(x, denoise(x, t).x0, t)
        history = carry["history"].push(slope, t)

        def started() -> Array:
            """The slope of a first step, from further evaluations."""
            if self.prk:
                return _runge_kutta(path, denoise, x, slope, t, s)
            return (slope + _slope_at(path, denoise, path.move(x, slope, t, s), s)) / 2

        def going_on() -> Array:
            weights = jnp.asarray(_ADAMS, x.dtype)[jnp.minimum(index, 3)]
            return jnp.tensordot(weights, history.values, 1)

        mean = jax.lax.cond(index < (3 if self.prk else 1), started, going_on)
        return {"x": path.move(x, mean, t, s), "history": history, "index": index + 1}


def _slope_at(path: NoiseLevel | Time, denoise: Denoiser, x: Array, t: Array) -> Array:
    return path.slope(x, denoise(x, t).x0, t)


def _runge_kutta(path: NoiseLevel | Time, denoise: Denoiser, x: Array, slope: Array, t: Array, s: Array) -> Array:
    """The paper's pseudo Runge-Kutta (eq. 13): its middle is the one of t."""
    middle = (t + s) / 2
    second = _slope_at(path, denoise, path.move(x, slope, t, middle), middle)
    third = _slope_at(path, denoise, path.move(x, second, t, middle), middle)
    fourth = _slope_at(path, denoise, path.move(x, third, t, s), s)
    return (slope + 2 * second + 2 * third + fourth) / 6


def make(prk: bool = False) -> PNDM:
    """One evaluation a step after the first. It wants even steps of t (`leading`, `trailing`).

    Args:
      prk: start with three Runge-Kutta steps of four evaluations (the paper's F-PNDM); if False, with one step of two,
        as latent diffusion does (PLMS).
    """
    return PNDM(prk)
