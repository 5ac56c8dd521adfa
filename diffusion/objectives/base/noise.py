"""Correlated noise for training, in place of independent noise for every number.

With independent noise the mean colour of an image remains visible at almost every noise level, so that a model hardly
learns to change it. The noise that sampling starts from stays independent, as is common practice.
"""

import jax

from diffusion.core.types import Array, InputError


def offset(eps: Array, key: Array, strength: float) -> Array:
    """Adds the same normal number, times `strength`, to all pixels of a channel.

    A channel of `eps [B, ..., C]` then has the covariance I + strength^2 1 1^T (Guttenberg 2023, "Diffusion with offset
    noise").
    """
    _check_pixels(eps, "offset_noise")
    shape = (eps.shape[0], *(1,) * (eps.ndim - 2), eps.shape[-1])
    return eps + strength * jax.random.normal(key, shape, eps.dtype)


def pyramid(eps: Array, key: Array, discount: float) -> Array:
    """Adds noise that is constant on blocks of 2, 4, 8, ... pixels a side, times `discount` to the power of the level.

    The sum is scaled to unit variance. This is multi-resolution noise (Whitaker 2023) with fixed blocks, in place of
    random sizes, whose covariance is known.
    """
    _check_pixels(eps, "pyramid_noise")
    height, width = eps.shape[-3:-1]
    total, variance = eps, 1.0
    for level in range(1, (max(height, width) - 1).bit_length() + 1):
        block = 2**level
        coarse = (*eps.shape[:-3], -(-height // block), -(-width // block), eps.shape[-1])
        noise = jax.random.normal(jax.random.fold_in(key, level), coarse, eps.dtype)
        noise = noise.repeat(block, axis=-3).repeat(block, axis=-2)[..., :height, :width, :]
        total, variance = total + discount**level * noise, variance + discount ** (2 * level)
    return total / variance**0.5


def _check_pixels(eps: Array, field: str) -> None:
    if eps.ndim < 4:
        raise InputError(f"objective.{field}", "must be 0 for data without pixels; it is for images and videos")
