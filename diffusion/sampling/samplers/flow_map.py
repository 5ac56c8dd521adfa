"""Sampling of flow maps: each step goes as far along the ODE's path as the grid wants, at one evaluation (Boffi et al.
2024, arXiv 2406.07507; MeanFlow, Geng et al. 2025, arXiv 2505.13447, eq. 12)."""

import dataclasses

import jax.numpy as jnp

from diffusion.sampling.ode.first_order import OneStep, first_order
from diffusion.core.types import Array, Denoiser, InputError, Schedule


@dataclasses.dataclass(frozen=True)
class FlowMap(OneStep):
    """From t to s at one stroke: the model is told both."""

    def step(self, x: Array, denoise: Denoiser, schedule: Schedule, t: Array, s: Array, keys: Array) -> Array:
        denoised = denoise(x, t, r=jnp.broadcast_to(s, x.shape[:1]))
        if denoised.kind != "step":
            raise InputError("sampler.name", "samples flow maps (mean_flow, shortcut), and this model does not know "
                             "where a step ends; use ddim or unipc")  # fmt: skip
        return first_order(schedule, x, denoised, t, s)


def make() -> FlowMap:
    """One evaluation a step."""
    return FlowMap()
