"""Sampling of flow maps (Boffi et al. 2024, arXiv 2406.07507; MeanFlow, Geng et al. 2025, arXiv 2505.13447, eq. 12).

A flow map receives both ends of the step, so that one evaluation covers any distance along the ODE trajectory. With x0
the model's answer for the step from t to s:

    x_s = alpha_s x0 + sigma_s eps,    eps = (x_t - alpha_t x0) / sigma_t

On the straight path, alpha = 1 - t and sigma = t, this is x_s = x_t - (t - s) u with the average velocity u = eps - x0.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep, first_order


@dataclasses.dataclass(frozen=True)
class FlowMapSampler(OneStep):
    """Evaluates the flow map from t to s."""

    few_step = True

    def step(
        self, x: Array, state: Any, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array
    ) -> tuple[Array, Array, Any]:
        denoised = denoise(x, t, target_time=jnp.broadcast_to(s, x.shape[:1]))
        if denoised.kind != "flow_map":
            raise InputError("sampler.name", "requires a flow map (mean_flow, shortcut), but this model is not "
                             "conditioned on the end of a step; use ddim or unipc")  # fmt: skip
        return first_order(schedule, x, denoised, t, s), denoised.x0, state


def make() -> FlowMapSampler:
    """Makes the flow-map sampler, with one evaluation per step."""
    return FlowMapSampler()
