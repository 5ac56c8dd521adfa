"""Inpainting by replacement: after each step, what is known is set to the image at the noise level of the step.

    x_s <- m x_s + (1 - m) (alpha_s x0 + sigma_s eps)

(Song et al. 2021, arXiv 2011.13456, section 5, and `StableDiffusionInpaintPipeline` of diffusers, which keeps eps.)
The result is not a sample given the known part, because the known part has noise that is independent of what the
network has drawn; see `repaint`. With a soft mask, a pixel of the value w takes the last w of the steps, like
image-to-image of strength w (Levin & Fried 2023, arXiv 2306.00950).
"""

from typing import Literal

import jax.numpy as jnp

from diffusion.core.types import Array
from diffusion.sampling import loop
from diffusion.sampling.editing.common import Editing, Hooks, Sampling


def make(noise: Literal["same", "fresh"] = "same", soft: bool = False) -> Editing:
    """Builds the method.

    Args:
      noise: The noise of the known part: the `same` in all steps, that of the start, or `fresh` noise in each.
      soft: Whether the mask is a strength per pixel; otherwise it counts as 1 from one half on, and as 0 below.
    """

    def hooks(sampling: Sampling) -> Hooks:
        schedule, known, times = sampling.schedule, sampling.known, sampling.times
        strength = known.mask if soft else known.is_drawn.astype(jnp.float32)
        steps = times.shape[0] - 1
        # The time from which on a pixel takes steps; up to there, it is that of the image with noise.
        begin = times[jnp.ceil((1 - strength) * steps - 1e-4).astype(jnp.int32)]

        def after_step(x: Array, x0: Array, t: Array, s: Array, step_keys: Array) -> Array:
            noised = loop.noised(schedule, known.image, s, sampling.keys if noise == "same" else step_keys)
            return jnp.where((s >= begin) & (strength < 1), noised.astype(x.dtype), x)

        return Hooks(sampling.denoise, after_step)

    return Editing(hooks, lambda known: known.mask == 0 if soft else ~known.is_drawn)
