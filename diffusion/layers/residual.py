"""Convolutional blocks of U-Nets, NHWC."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core.types import Array
from diffusion.layers.keys import Keys
from diffusion.layers.norms import group_norm
from diffusion.layers.resample import MEAN, Taps, double, halve


@dataclasses.dataclass(frozen=True)
class Style:
    """What the blocks of one U-Net have in common; see `networks.unet.make`."""

    emb_features: int
    dropout: float = 0.0
    scale_shift: bool = True
    rescale: bool = False
    resample_filter: Taps = MEAN
    groups: int | None = None
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    def norm(self, channels: int, rngs: Keys) -> nnx.GroupNorm:
        return group_norm(channels, self.groups, self.epsilon, dtype=self.dtype, rngs=rngs)

    def add(self, a: Array, b: Array) -> Array:
        return (a + b) / math.sqrt(2) if self.rescale else a + b


def conv3x3(
    in_channels: int, out_channels: int, *, strides: int = 1, padding: Any = 1, zero: bool = False, dtype, rngs
):
    """A 3x3 convolution that keeps the size, or halves it with `strides=2`; `zero` starts it at 0."""
    init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
    return nnx.Conv(
        in_channels, out_channels, (3, 3), strides, padding=padding, kernel_init=init, dtype=dtype, rngs=rngs
    )


class ResidualBlock(nnx.Module):
    """norm, silu, conv, twice, around which the input is added: the identity at initialisation.

    The embedding is added between the two (Ho et al. 2020), or with `scale_shift` it scales and shifts the second norm;
    with `resample` the block halves or doubles the image before its first convolution, and the input that is added
    likewise (ADM: Dhariwal & Nichol 2021, arXiv 2105.05233, section 3; BigGAN). The input passes a linear layer where
    its channels are others, or it is to be `projected`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        style: Style,
        *,
        resample: Literal["halve", "double"] | None = None,
        projected: bool = False,
        rngs: Keys,
    ):
        self.style = style
        self.resample = {"halve": halve, "double": double, None: None}[resample]
        kwargs = dict(dtype=style.dtype, rngs=rngs)
        self.norm1 = style.norm(in_channels, rngs)
        self.conv1 = conv3x3(in_channels, out_channels, **kwargs)
        self.emb = nnx.Linear(style.emb_features, (2 if style.scale_shift else 1) * out_channels, **kwargs)
        self.norm2 = style.norm(out_channels, rngs)
        self.conv2 = conv3x3(out_channels, out_channels, zero=True, **kwargs)
        self.dropout = nnx.Dropout(style.dropout)
        same = in_channels == out_channels and not projected
        self.skip = None if same else nnx.Linear(in_channels, out_channels, **kwargs)

    def __call__(self, x: Array, emb: Array, key: Array | None) -> Array:
        """x `[B, H, W, Cin]`, emb `[B, E]` -> `[B, H', W', Cout]`; `key` None switches dropout off."""
        h = jax.nn.silu(self.norm1(x))
        if self.resample is not None:
            h, x = (self.resample(part, self.style.resample_filter) for part in (h, x))
        h = self.conv1(h)
        emb = self.emb(jax.nn.silu(emb))[:, None, None, :]
        if self.style.scale_shift:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.dropout(jax.nn.silu(h), deterministic=key is None, rngs=key)
        return self.style.add(x if self.skip is None else self.skip(x), self.conv2(h))


class Downsample(nnx.Module):
    """Halves height and width by a strided convolution, padded all around, or (`asymmetric_padding`) below and right alone."""

    def __init__(self, channels: int, style: Style, *, asymmetric_padding: bool = False, rngs: Keys):
        padding = ((0, 1), (0, 1)) if asymmetric_padding else 1
        self.conv = conv3x3(channels, channels, strides=2, padding=padding, dtype=style.dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width, then convolves."""

    def __init__(self, channels: int, style: Style, *, rngs: Keys):
        self.resample_filter = style.resample_filter
        self.conv = conv3x3(channels, channels, dtype=style.dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(double(x, self.resample_filter))
