"""Predictor-corrector sampling (Song et al. 2021, arXiv 2011.13456, algorithms 2 and 3).

After each step of the predictor but the last, `corrections` steps of Langevin dynamics at the new time s:

    x <- x + size score(x, s) + sqrt(2 size) z,    score(x, s) = -eps(x, s) / sigma_s
    size = 2 (alpha_t / alpha_s)^2 (snr sigma_s)^2

The paper's step size is 2 a (snr |z| / |score|)^2, with norms averaged over the batch, and a = 1 - beta for VP, 1 for
VE. Here a is (alpha_t / alpha_s)^2, and sigma_s replaces |z| / |score|, from which it differs only by the contribution
of the data, so that the samples of a batch do not depend on one another.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.core import checks
from diffusion.core.arrays import fold, normal
from diffusion.core.build import build
from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep, eps_of


@dataclasses.dataclass(frozen=True)
class PredictorCorrector(OneStep):
    """Alternates steps of a predictor with Langevin dynamics."""

    predictor: OneStep
    corrections: int = 1
    snr: float = 0.16
    stochastic = True

    def evaluations(self, steps: int, to_data: bool = True) -> int | None:
        predictor = self.predictor.evaluations(steps, to_data)
        return None if predictor is None else predictor + (steps - to_data) * self.corrections

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        # The keys are folded with 0 for the predictor, and with 1 and upwards for the corrections.
        x, x0, state = self.predictor.step(x, state, denoise, schedule, t, s, fold(keys, 0))

        def correct(i: Array, x: Array) -> Array:
            noise = normal(fold(keys, i + 1), x.shape[1:], x.dtype)
            sigma = schedule.sigma(s)
            score = -eps_of(schedule, x, denoise(x, s).x0, s) / sigma
            size = 2 * (schedule.alpha(t) / schedule.alpha(s)) ** 2 * (self.snr * sigma) ** 2
            return x + size * score + jnp.sqrt(2 * size) * noise

        def corrected() -> Array:
            return jax.lax.fori_loop(0, self.corrections, correct, x)

        return jax.lax.cond(schedule.sigma(s) > 0, corrected, lambda: x), x0, state


def make(
    predictor: str | Mapping[str, Any] = "ancestral", corrections: int = 1, snr: float = 0.16
) -> PredictorCorrector:
    """Makes the predictor-corrector sampler, with the predictor's evaluations and one per correction.

    Args:
      predictor: the name or section of any sampler without a state; the paper's is `euler_maruyama` with `sbdm`.
      corrections: Langevin steps after each step of the predictor.
      snr: r of the paper, the ratio of a Langevin step's drift to its noise.
    """
    built = build("samplers", predictor, field="predictor")
    if not isinstance(built, OneStep):
        raise InputError("predictor", f"must have no state, as ancestral, ddim or euler; got {predictor!r}")
    checks.at_least(1, corrections=corrections)
    checks.positive(snr=snr)
    return PredictorCorrector(built, corrections, snr)
