"""Convolutional blocks of U-Nets, in NHWC layout."""

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core.types import Array
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear
from diffusion.layers.norms import group_norm
from diffusion.layers.resample import BOX, Filter, double, halve


@dataclasses.dataclass(frozen=True)
class BlockConfig:
    """The options that all blocks of a U-Net share; see `networks.unet.make`.

    Attributes:
      emb_features: The width of the embedding.
    """

    emb_features: int
    dropout: float = 0.0
    scale_shift: bool = True
    rescale: bool = False
    resample_filter: Filter = BOX
    groups: int | None = None
    epsilon: float = 1e-5
    dtype: Any = jnp.float32

    def norm(self, channels: int, rngs: Keys) -> nnx.GroupNorm:
        """Returns a group normalisation layer."""
        return group_norm(channels, self.groups, self.epsilon, dtype=self.dtype, rngs=rngs)

    def add(self, a: Array, b: Array) -> Array:
        """Returns the sum, divided by sqrt(2) if `rescale` is set."""
        return (a + b) / math.sqrt(2) if self.rescale else a + b


def conv3x3(
    in_channels: int, out_channels: int, *, strides: int = 1, padding: Any = 1, zero: bool = False, bias: bool = True,
    dtype: Any, rngs
):  # fmt: skip
    """Returns a 3x3 convolution that preserves the size, or halves it with `strides=2`; `zero` initialises it to 0."""
    init = nnx.initializers.zeros if zero else nnx.initializers.lecun_normal()
    return nnx.Conv(
        in_channels,
        out_channels,
        (3, 3),
        strides,
        padding=padding,
        use_bias=bias,
        kernel_init=init,
        dtype=dtype,
        rngs=rngs,
    )


class ResidualBlock(nnx.Module):
    """A residual block: norm, silu and convolution, twice; the identity at initialisation.

    The embedding is added between the two convolutions (Ho et al. 2020). With `scale_shift` it scales and shifts the
    second norm instead (ADM: Dhariwal & Nichol 2021, arXiv 2105.05233, section 3).

    Args:
      in_channels: The channels of the input.
      out_channels: The channels of the output.
      config: The options shared by all blocks.
      resample: Halves or doubles the image before the first convolution and on the skip connection (BigGAN, ADM).
      projected: Whether the skip connection is a linear layer even where the number of channels stays the same.
      rngs: The random keys that the parameters are drawn from.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        config: BlockConfig,
        *,
        resample: Literal["halve", "double"] | None = None,
        projected: bool = False,
        rngs: Keys,
    ):
        self.config = config
        self.resample = {"halve": halve, "double": double, None: None}[resample]
        kwargs = dict(dtype=config.dtype, rngs=rngs)
        self.norm1 = config.norm(in_channels, rngs)
        self.conv1 = conv3x3(in_channels, out_channels, **kwargs)
        self.emb = Linear(config.emb_features, (2 if config.scale_shift else 1) * out_channels, **kwargs)
        self.norm2 = config.norm(out_channels, rngs)
        self.conv2 = conv3x3(out_channels, out_channels, zero=True, **kwargs)
        self.dropout = nnx.Dropout(config.dropout)
        same = in_channels == out_channels and not projected
        self.skip = None if same else Linear(in_channels, out_channels, **kwargs)

    def __call__(self, x: Array, emb: Array, key: Array | None) -> Array:
        """Maps x `[B, H, W, Cin]` and emb `[B, E]` to `[B, H', W', Cout]`; a `key` of None disables dropout."""
        h = jax.nn.silu(self.norm1(x))
        if self.resample is not None:
            h, x = (self.resample(part, self.config.resample_filter) for part in (h, x))
        h = self.conv1(h)
        emb = self.emb(jax.nn.silu(emb))[:, None, None, :]
        if self.config.scale_shift:
            scale, shift = jnp.split(emb, 2, axis=-1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        h = self.dropout(jax.nn.silu(h), deterministic=key is None, rngs=key)
        return self.config.add(x if self.skip is None else self.skip(x), self.conv2(h))


class Downsample(nnx.Module):
    """Halves height and width by a strided convolution.

    The convolution is padded on all sides, or with `asymmetric_padding` only at the bottom and on the right.
    """

    def __init__(self, channels: int, config: BlockConfig, *, asymmetric_padding: bool = False, rngs: Keys):
        padding = ((0, 1), (0, 1)) if asymmetric_padding else 1
        self.conv = conv3x3(channels, channels, strides=2, padding=padding, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width, then applies a convolution.

    A `size` of one row or column less, from which halving rounds up, is what the convolution sees.
    """

    def __init__(self, channels: int, config: BlockConfig, *, rngs: Keys):
        self.resample_filter = config.resample_filter
        self.conv = conv3x3(channels, channels, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        x = double(x, self.resample_filter)
        return self.conv(x if size is None else x[:, : size[0], : size[1]])
