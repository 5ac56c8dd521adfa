"""Layers that hand on the magnitude of what they get, so that nothing but learned gains can change it (Karras et al.
2023, arXiv 2312.02696, appendix B). Magnitude is the root of the mean square (RMS); inputs are taken to have RMS 1.

Weights have their output units on the last axis. Their direction counts, and not their length.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion.core.types import Array, Params
from diffusion.layers.keys import Keys

EPSILON = 1e-4  # beside every RMS that is divided by
SILU_RMS = 0.596  # of silu(z), z ~ N(0, 1)


def pixel_norm(x: Array) -> Array:
    """x `[..., C]` with RMS 1 over the channels, of x's dtype."""
    return _to_unit(x.astype(jnp.float32), axis=-1).astype(x.dtype)


def normalize(w: Array) -> Array:
    """Weights `[..., out]` with RMS 1 for each output unit. The gradient of anything with respect to w is therefore
    orthogonal to w, unit by unit (eq. 47 and section 2.3)."""
    return _to_unit(w, axis=tuple(range(w.ndim - 1)))


def normalize_all(params: Params) -> Params:
    """Forced weight normalisation (eq. 66): every weight as `normalize` has it, every scalar gain as it is. After each
    step, as a `Network.project`, it keeps the orthogonal gradients from making the weights longer and longer, so that
    the learning rate alone says how far a weight turns in a step."""
    return jax.tree.map(lambda leaf: normalize(leaf) if leaf.ndim > 1 else leaf, params)


def _to_unit(x: Array, axis: int | tuple[int, ...]) -> Array:
    mean_square = jnp.mean(jnp.square(x), axis=axis, keepdims=True)
    # The maximum matters at x = 0 alone, where the root has no gradient.
    return x / (EPSILON + jnp.sqrt(jnp.maximum(mean_square, jnp.finfo(x.dtype).tiny)))


def mp_silu(x: Array) -> Array:
    """silu, scaled to RMS 1 for normal x (eq. 81)."""
    return jax.nn.silu(x) / SILU_RMS


def mp_sum(a: Array, b: Array, t: float) -> Array:
    """From a (t = 0) to b (t = 1); a and b of one shape and uncorrelated (eq. 88)."""
    return ((1 - t) * a + t * b) / math.hypot(1 - t, t)


def mp_cat(a: Array, b: Array, t: float = 0.5) -> Array:
    """The channels of a `[..., A]`, then of b `[..., B]`. Their shares of the mean square over both are as (1 - t)^2 is
    to t^2, however many channels each has (eq. 103)."""
    A, B = a.shape[-1], b.shape[-1]
    total = math.sqrt(A + B) / math.hypot(1 - t, t)
    return jnp.concatenate([total * (1 - t) / math.sqrt(A) * a, total * t / math.sqrt(B) * b], axis=-1)


def fourier_features(c: Array, width: int, bandwidth: float = 1.0) -> Array:
    """Cosines of c `[B]`, `[B, width]`, float32, at frequencies drawn from N(0, bandwidth^2), in cycles, and at uniform
    phases (eq. 75). The draw is the same every time: it is no parameter."""
    fixed = np.random.RandomState(0)  # whose stream NumPy keeps as it is for good; trained weights rely on it
    frequency, phase = bandwidth * fixed.randn(width), fixed.rand(width)
    angle = c[:, None].astype(jnp.float32) * np.float32(frequency) + np.float32(phase)
    return math.sqrt(2) * jnp.cos(2 * math.pi * angle)


class MPLinear(nnx.Module):
    """x `[..., in]` -> `[..., out]`, without bias: on images, the 1x1 convolution (eq. 47)."""

    def __init__(self, in_features: int, out_features: int, *, window: tuple[int, ...] = (), dtype: Any, rngs):
        self.dtype = dtype
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), (*window, in_features, out_features)))

    def __call__(self, x: Array, gain: Array | float = 1.0) -> Array:
        return x.astype(self.dtype) @ self._weight(gain)

    def _weight(self, gain: Array | float) -> Array:
        """For which uncorrelated inputs of RMS 1 give outputs of RMS `gain`; normalised in float32."""
        kernel = self.kernel[...]
        fan_in = math.prod(kernel.shape[:-1])
        return (normalize(kernel) * (gain / math.sqrt(fan_in))).astype(self.dtype)


class MPConv(MPLinear):
    """x `[B, H, W, in]` -> `[B, H, W, out]`: a 3x3 convolution with zeros around the image, without bias."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: Any, rngs: Keys):
        super().__init__(in_channels, out_channels, window=(3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, gain: Array | float = 1.0) -> Array:
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype), self._weight(gain), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
