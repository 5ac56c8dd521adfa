"""Guidance by the network itself with some of its blocks made worse; see `diffusion.sampling.guidance`.

No condition has to be dropped, so that it applies to any model. Around another guidance, as in `pag(cfg(denoise, 5.0))`
with its other arguments, the differences of both are added, as the papers do with classifier-free guidance.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.core.arrays import expand
from diffusion.core.types import Array, Cond, Denoised, Denoiser, InputError, Perturbation
from diffusion.sampling.guidance.common import Traced

Perturbed = Callable[[Perturbation], Denoiser]  # the model with some blocks of its network changed


def pag(guided: Denoiser, scale: Traced = 3.0, layers: tuple[int, ...] = (), *, perturbed: Perturbed) -> Denoiser:
    """Perturbed-attention guidance (Ahn et al. 2024, arXiv 2403.17377):

        x0 = x0_guided + scale (x0_cond - x0_perturbed)

    In the perturbed evaluation the self-attention matrix of some blocks is the identity.

    Args:
      guided: any denoiser; without other guidance, x0_guided is x0_cond.
      scale: 0 is no guidance.
      layers: numbers of the blocks from 0; see `types.Perturbation`. If empty, the one in the middle, as in the paper.
    """
    return _away_from(guided, perturbed(Perturbation("identity", layers)), scale)


def seg(
    guided: Denoiser,
    scale: Traced = 3.0,
    layers: tuple[int, ...] = (),
    sigma: float = math.inf,
    *,
    perturbed: Perturbed,
) -> Denoiser:
    """Smoothed energy guidance (Hong 2024, arXiv 2408.00760): `pag` with another perturbation.

    In the perturbed evaluation the queries of the self-attention of some blocks are blurred.

    Args:
      guided, scale, layers: as in `pag`.
      sigma: the standard deviation of the blur, in tokens; infinite for the mean over all queries.
    """
    if not sigma > 0:
        raise InputError("sigma", f"must be positive, got {sigma}")
    return _away_from(guided, perturbed(Perturbation("blur", layers, sigma)), scale)


def slg(
    guided: Denoiser,
    scale: Traced = 2.8,
    layers: tuple[int, ...] = (),
    low: Traced = 0.0,
    high: Traced = 1.0,
    *,
    perturbed: Perturbed,
) -> Denoiser:
    """Skip-layer guidance, as published with Stable Diffusion 3.5: `pag` with another perturbation.

    In the perturbed evaluation some blocks of a transformer are left out. Stable Diffusion 3.5 Medium uses the layers
    7, 8 and 9 of 24, after the first 1 % of the steps and before 20 %.

    Args:
      guided, scale, layers: as in `pag`.
      low, high: the times between which it applies, both included. Outside of them the perturbed network is not
        evaluated.
    """
    return _away_from(guided, perturbed(Perturbation("skip", layers)), scale, (low, high))


def _away_from(
    guided: Denoiser, worse: Denoiser, scale: Traced, limits: tuple[Traced, Traced] | None = None
) -> Denoiser:
    """Adds scale times the difference between the conditional x0 and that of a worse denoiser.

    With `limits` it applies at times between them alone.
    """

    def moved(x: Array, t: Array, cond: Cond) -> Denoised:
        denoised = guided(x, t, cond)
        conditional = denoised.x0 if denoised.conditional is None else denoised.conditional

        def change() -> Array:
            return scale * (conditional - worse(x, t, cond).x0)

        if limits is None:
            x0 = denoised.x0 + change()
        else:
            inside = (t >= limits[0]) & (t <= limits[1])
            if jnp.ndim(inside) == 0:
                x0 = denoised.x0 + jax.lax.cond(inside, change, lambda: jnp.zeros_like(conditional))
            else:
                x0 = denoised.x0 + jnp.where(expand(inside, x), change(), 0)
        return dataclasses.replace(denoised, x0=x0, conditional=conditional)

    return moved
