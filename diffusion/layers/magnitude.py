"""Magnitude-preserving layers: only learned gains change the magnitude of their inputs (Karras et al. 2023, arXiv
2312.02696, appendix B). The magnitude is the root mean square (RMS); inputs are assumed to have RMS 1.

Weights have their output units on the last axis. Only the direction of a weight has an effect, not its length.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core.types import Array, Params
from diffusion.layers.keys import Keys

EPSILON = 1e-4  # added to every RMS that is a divisor
SILU_RMS = 0.596  # RMS of silu(z) for z ~ N(0, 1)


def pixel_norm(x: Array) -> Array:
    """Scales x `[..., C]` to RMS 1 over the channels. The result has x's dtype."""
    return _to_unit(x.astype(jnp.float32), axis=-1).astype(x.dtype)


def normalize(w: Array) -> Array:
    """Scales weights `[..., out]` to RMS 1 for each output unit.

    The gradient of any function of the result with respect to w is therefore orthogonal to w, per output unit (eq. 47
    and section 2.3).
    """
    return _to_unit(w, axis=tuple(range(w.ndim - 1)))


def normalize_all(params: Params) -> Params:
    """Applies forced weight normalisation (eq. 66): `normalize` for every weight; scalar gains are left unchanged.

    Applied after each step, as `Network.project`, it prevents the orthogonal gradients from increasing the length of
    the weights, so that the learning rate alone determines how far a weight rotates per step.
    """
    return jax.tree.map(lambda leaf: normalize(leaf) if leaf.ndim > 1 else leaf, params)


def _to_unit(x: Array, axis: int | tuple[int, ...]) -> Array:
    mean_square = jnp.mean(jnp.square(x), axis=axis, keepdims=True)
    # The maximum has an effect only at x = 0, where the square root has no finite gradient.
    return x / (EPSILON + jnp.sqrt(jnp.maximum(mean_square, jnp.finfo(x.dtype).tiny)))


def mp_silu(x: Array) -> Array:
    """Computes silu, scaled to RMS 1 for standard normal x (eq. 81)."""
    return jax.nn.silu(x) / SILU_RMS


def mp_sum(a: Array, b: Array, t: float) -> Array:
    """Interpolates from a (t = 0) to b (t = 1) at RMS 1, for uncorrelated a and b of the same shape (eq. 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: Array, b: Array, t: float = 0.5) -> Array:
    """Concatenates a `[..., A]` and b `[..., B]` along the channels at RMS 1.

    a and b contribute to the mean square in the ratio (1 - t)^2 : t^2, whatever their numbers of channels (eq. 103).
    """
    A, B = a.shape[-1], b.shape[-1]
    total = math.sqrt(A + B) / math.hypot(1 - t, t)
    return jnp.concatenate([total * (1 - t) / math.sqrt(A) * a, total * t / math.sqrt(B) * b], axis=-1)


class MPLinear(nnx.Module):
    """A linear layer x `[..., in]` -> `[..., out]` without bias (eq. 47); on images, a 1x1 convolution."""

    def __init__(self, in_features: int, out_features: int, *, window: tuple[int, ...] = (), dtype: Any, rngs: Keys):
        self.dtype = dtype
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (*window, in_features, out_features)))

    def __call__(self, x: Array, gain: Array | float = 1.0) -> Array:
        return x.astype(self.dtype) @ self._weight(gain)

    def _weight(self, gain: Array | float) -> Array:
        """Returns the weight for which uncorrelated inputs of RMS 1 give outputs of RMS `gain`, normalised in
        float32."""
        kernel = self.kernel[...]
        fan_in = math.prod(kernel.shape[:-1])
        return (normalize(kernel) * (gain / math.sqrt(fan_in))).astype(self.dtype)


class MPConv(MPLinear):
    """A 3x3 convolution x `[B, H, W, in]` -> `[B, H, W, out]` with zero padding and without bias."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: Any, rngs: Keys):
        super().__init__(in_channels, out_channels, window=(3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, gain: Array | float = 1.0) -> Array:
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype), self._weight(gain), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
