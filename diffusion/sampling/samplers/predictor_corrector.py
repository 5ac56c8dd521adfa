"""Predictor-corrector sampling (Song et al. 2021, arXiv 2011.13456, algorithms 2 and 3)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core.arrays import fold, normal
from diffusion.core.build import build
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep, eps_of


@dataclasses.dataclass(frozen=True)
class PredictorCorrector(OneStep):
    """After each step of the predictor but the last, steps of Langevin dynamics at the level it has reached."""

    predictor: OneStep
    corrections: int = 1
    snr: float = 0.16
    stochastic = True

    def evaluations(self, steps: int) -> int | None:
        predictor = self.predictor.evaluations(steps)
        return None if predictor is None else predictor + (steps - 1) * self.corrections

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        # The predictor has the keys' own numbers, the corrections those folded from 1 on.
        x = self.predictor.step(x, denoise, schedule, t, s, fold(keys, 0))

        def correct(i: Array, x: Array) -> Array:
            noise = normal(fold(keys, i + 1), x.shape[1:], x.dtype)
            sigma = schedule.sigma(s)
            score = -eps_of(schedule, x, denoise(x, s).x0, s) / sigma
            # 1 - beta of the step, as the paper has it: 1 where alpha does not change. Its ratio of the norms of noise
            # and score, means over a batch, is sigma to within the data's share, and no sample depends on another so.
            size = 2 * (schedule.alpha(t) / schedule.alpha(s)) ** 2 * (self.snr * sigma) ** 2
            return x + size * score + jnp.sqrt(2 * size) * noise

        def corrected() -> Array:
            return jax.lax.fori_loop(0, self.corrections, correct, x)

        return jax.lax.cond(schedule.sigma(s) > 0, corrected, lambda: x)


def make(
    predictor: str | Mapping[str, Any] = "ancestral", corrections: int = 1, snr: float = 0.16
) -> PredictorCorrector:
    """Args:
    predictor: any sampler that carries x alone, by its spec; `euler_maruyama` with `sbdm` is the paper's.
    corrections: Langevin steps, one evaluation each.
    snr: r of the paper, the ratio of a step's drift to its noise.
    """
    built = build("samplers", predictor, field="predictor")
    if not isinstance(built, OneStep):
        raise InputError("predictor", f"{predictor!r} carries more than x; use ancestral, ddim, euler or the like")
    if corrections < 1:
        raise InputError("corrections", f"must be at least 1, got {corrections}")
    if snr <= 0:
        raise InputError("snr", f"must be positive, got {snr}")
    return PredictorCorrector(built, corrections, snr)
