"""Sampling of flow maps: each step goes as far along the ODE's path as the grid wants, at one evaluation (Boffi et al.
2024, arXiv 2406.07507; MeanFlow, Geng et al. 2025, arXiv 2505.13447, eq. 12)."""

import dataclasses

import jax.numpy as jnp

from diffusion.core.types import Array, Denoiser, InputError, Schedule
from diffusion.sampling.ode.first_order import OneStep, first_order


@dataclasses.dataclass(frozen=True)
class FlowMapSampler(OneStep):
    """From t to s at one stroke: the model is told both."""

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        denoised = denoise(x, t, target_time=jnp.broadcast_to(s, x.shape[:1]))
        if denoised.kind != "flow_map":
            raise InputError("sampler.name", "samples flow maps (mean_flow, shortcut), and this model does not know "
                             "where a step ends; use ddim or unipc")  # fmt: skip
        return first_order(schedule, x, denoised, t, s)


def make() -> FlowMapSampler:
    """One evaluation a step."""
    return FlowMapSampler()
