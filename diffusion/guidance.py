"""Guidance, by name: each takes a denoiser and gives back a denoiser, so they nest. Numbers may be traced arrays:
changing them does not recompile."""

import jax.numpy as jnp

from diffusion.types import Array, Cond, Denoised, Denoiser


def cfg(denoise: Denoiser, scale: float | Array = 1.0) -> Denoiser:
    """Classifier-free guidance, `uncond + scale (cond - uncond)`: 1 is conditional, 0 unconditional (Ho & Salimans
    2022, arXiv 2207.12598, whose w is scale - 1).

    Both halves go through the network as one batch of 2B. An example's two rows stand side by side, so a batch that is
    sharded over devices stays where it is.
    """

    def guided(x: Array, t: Array, cond: Cond) -> Denoised:
        twice = {name: jnp.repeat(value, 2, axis=0) for name, value in cond.items()}
        twice["keep"] = jnp.tile(jnp.array([True, False]), x.shape[0])
        both = denoise(jnp.repeat(x, 2, axis=0), jnp.repeat(jnp.broadcast_to(t, x.shape[:1]), 2), twice)
        kept, dropped = both.x0[0::2], both.x0[1::2]
        log_variance = None if both.log_variance is None else both.log_variance[0::2]
        return Denoised(dropped + scale * (kept - dropped), log_variance)

    return guided
