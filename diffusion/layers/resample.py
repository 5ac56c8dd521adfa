"""Resampling of images `[B, H, W, C]` by a factor of 2 with a separable filter.

A filter is a symmetric tuple of an even number of weights, in any scale. (1, 1) averages 2 x 2 pixels on the way down
and repeats pixels on the way up; (1, 3, 3, 1) is the smoother filter of StyleGAN2 and NCSN++ (Song et al. 2021, arXiv
2011.13456, appendix H). Doubling is the transpose of halving, times 4, so constant images are preserved.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.types import Array

Filter = tuple[int, ...]
BOX: Filter = (1, 1)


def halve(x: Array, resample_filter: Filter) -> Array:
    """Halves height and width: `[B, H, W, C]` -> `[B, H / 2, W / 2, C]`."""
    B, H, W, C = x.shape
    if resample_filter == BOX:
        return x.reshape(B, H // 2, 2, W // 2, 2, C).mean((2, 4))
    pad = (len(resample_filter) - 1) // 2
    return _depthwise(x, resample_filter, window_strides=(2, 2), padding=[(pad, pad)] * 2)


def double(x: Array, resample_filter: Filter) -> Array:
    """Doubles height and width: `[B, H, W, C]` -> `[B, 2 H, 2 W, C]`."""
    if resample_filter == BOX:  # equal to the convolution below, without its multiplications
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    pad = len(resample_filter) - 1 - (len(resample_filter) - 1) // 2
    return 4 * _depthwise(x, resample_filter, window_strides=(1, 1), padding=[(pad, pad)] * 2, lhs_dilation=(2, 2))


def _depthwise(x: Array, resample_filter: Filter, **options: Any) -> Array:
    C = x.shape[-1]
    weights = np.array(resample_filter, np.float32) / np.sum(resample_filter)
    kernel = jnp.asarray(np.outer(weights, weights)[:, :, None, None].repeat(C, axis=3), x.dtype)
    return jax.lax.conv_general_dilated(
        x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=C, **options
    )
