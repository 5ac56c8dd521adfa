"""Guidance by another model or by the network itself; see `diffusion.sampling.guidance`."""

import dataclasses

import jax.numpy as jnp

from diffusion.core.types import Array, Cond, Denoised, Denoiser
from diffusion.sampling.guidance.common import Traced


def autoguidance(denoise: Denoiser, scale: Traced = 1.0, *, worse: Denoiser) -> Denoiser:
    """Guidance by a worse version of the model (Karras et al. 2024, arXiv 2406.02507):

        x0 = x0_worse + scale (x0 - x0_worse)

    The model need not be trained with dropped conditions.

    Args:
      scale: 1 is the model itself; above 1 guides.
      worse: the same objective with other parameters: of a smaller network, or of an earlier step.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        good, bad = denoise(x, t, cond), worse(x, t, cond)
        conditional = good.x0 if good.conditional is None else good.conditional
        return dataclasses.replace(good, x0=bad.x0 + scale * (good.x0 - bad.x0), conditional=conditional)

    return guided


def guidance_embedding(denoise: Denoiser, scale: Traced = 1.0) -> Denoiser:
    """Passes the scale to the network as its condition `guidance_scale`, at the cost of one evaluation.

    It is for models distilled from a guided one (guidance distillation; Meng et al. 2023, arXiv 2210.03142), whose
    network has the guidance scale as an input.

    Args:
      scale: as in `cfg`, within the range that the model was trained for.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        return denoise(x, t, {**cond, "guidance_scale": jnp.full(x.shape[:1], scale, jnp.float32)})

    return guided
