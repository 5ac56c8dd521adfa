"""Convolutional blocks of U-Nets, NHWC."""

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.layers.norms import group_norm
from diffusion.types import Array


def conv3x3(in_channels: int, out_channels: int, *, strides: int = 1, zero: bool = False, dtype, rngs: nnx.Rngs):
    """A 3x3 convolution that keeps the size, or halves it with `strides=2`; `zero` starts it at 0."""
    init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
    return nnx.Conv(in_channels, out_channels, (3, 3), strides, padding=1, kernel_init=init, dtype=dtype, rngs=rngs)


class ResidualBlock(nnx.Module):
    """norm, silu, conv, twice, around which the input is added; the embedding scales and shifts the second norm (ADM's
    block: Dhariwal & Nichol 2021, arXiv 2105.05233, section 3). The identity at initialisation."""

    def __init__(self, in_channels: int, out_channels: int, emb_features: int, dropout: float, *, dtype, rngs):
        self.norm1 = group_norm(in_channels, dtype=dtype, rngs=rngs)
        self.conv1 = conv3x3(in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.emb = nnx.Linear(emb_features, 2 * out_channels, dtype=dtype, rngs=rngs)
        self.norm2 = group_norm(out_channels, dtype=dtype, rngs=rngs)
        self.conv2 = conv3x3(out_channels, out_channels, zero=True, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(dropout)
        same = in_channels == out_channels
        self.skip = None if same else nnx.Linear(in_channels, out_channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, emb: Array, rngs: nnx.Rngs | None) -> Array:
        """x `[B, H, W, Cin]`, emb `[B, E]` -> `[B, H, W, Cout]`; `rngs` None switches dropout off."""
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        scale, shift = jnp.split(self.emb(jax.nn.silu(emb))[:, None, None, :], 2, axis=-1)
        h = self.norm2(h) * (1 + scale) + shift
        h = self.dropout(jax.nn.silu(h), deterministic=rngs is None, rngs=rngs)
        return (x if self.skip is None else self.skip(x)) + self.conv2(h)


class Downsample(nnx.Module):
    """Halves height and width by a strided convolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv3x3(channels, channels, strides=2, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels: int, *, dtype, rngs: nnx.Rngs):
        self.conv = conv3x3(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2))
