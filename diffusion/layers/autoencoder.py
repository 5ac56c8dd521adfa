"""The convolutional encoder and decoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), NHWC, and the
functions of a network that is an autoencoder.

Attributes are named as in diffusers, where `down_blocks_0/resnets_1/conv1` here is `down_blocks.0.resnets.1.conv1`
there, so that weights are converted without a table (`encoders.autoencoder_folder`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from diffusion.core import checks
from diffusion.core.types import Array, Cond, InputError, Params
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.attention import attend
from diffusion.layers.functional import check
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear
from diffusion.layers.resample import BOX, double
from diffusion.layers.residual import conv3x3


@dataclasses.dataclass(frozen=True)
class TrunkConfig:
    """The options that the encoder and the decoder share; see `networks.autoencoder_kl.make`."""

    shape: tuple[int, ...]
    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    mid_block_add_attention: bool
    dtype: Any

    def __post_init__(self):
        check_levels(self.shape, "block_out_channels", self.block_out_channels)
        checks.network_size(layers_per_block=self.layers_per_block, norm_num_groups=self.norm_num_groups)
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                problem = f"must divide the {channels} channels of a level, got {self.norm_num_groups}"
                raise InputError("norm_num_groups", problem)

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of a latent."""
        factor = 2 ** (len(self.block_out_channels) - 1)
        return self.shape[0] // factor, self.shape[1] // factor

    def norm(self, channels: int, rngs: Keys) -> nnx.GroupNorm:
        """Returns a group norm. The variance is computed from the differences to the mean, because images have
        large means."""
        return nnx.GroupNorm(channels, self.norm_num_groups, epsilon=1e-6, use_fast_variance=False, dtype=self.dtype,
                             rngs=rngs)  # fmt: skip

    def conv(self, in_channels: int, out_channels: int, rngs: Keys, **options: Any) -> nnx.Conv:
        """Returns a 3x3 convolution that preserves the size."""
        return conv3x3(in_channels, out_channels, dtype=self.dtype, rngs=rngs, **options)


def check_levels(shape: tuple[int, ...], name: str, channels: tuple[int, ...]) -> None:
    """Checks the channels of each level, an option called `name`, and that images can be halved between the levels."""
    checks.images("an autoencoder", shape)
    if not channels or min(channels) < 1:
        raise InputError(name, f"must be one or more positive numbers, got {channels}")
    checks.at_most(checks.LARGEST, max(channels), name)
    for pixels in shape[:2]:
        if pixels % (1 << len(channels) - 1):
            raise InputError(name, f"{pixels} pixels cannot be halved {len(channels) - 1} times; use fewer levels")


def pointwise(in_channels: int, out_channels: int, *, dtype: Any = jnp.float32, rngs: Keys) -> nnx.Conv:
    """Returns a 1x1 convolution."""
    return nnx.Conv(in_channels, out_channels, (1, 1), dtype=dtype, rngs=rngs)


class Resnet(nnx.Module):
    """A residual block without an embedding: norm, silu and convolution, twice."""

    def __init__(self, in_channels: int, out_channels: int, config: TrunkConfig, *, rngs: Keys):
        self.norm1 = config.norm(in_channels, rngs)
        self.conv1 = config.conv(in_channels, out_channels, rngs)
        self.norm2 = config.norm(out_channels, rngs)
        self.conv2 = config.conv(out_channels, out_channels, rngs)
        same = in_channels == out_channels
        self.conv_shortcut = None if same else pointwise(in_channels, out_channels, dtype=config.dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        h = self.conv1(jax.nn.silu(self.norm1(x)))
        h = self.conv2(jax.nn.silu(self.norm2(h)))
        return constrain(h + (x if self.conv_shortcut is None else self.conv_shortcut(x)))


class Attention(nnx.Module):
    """Self-attention over all positions with one head, added to x."""

    def __init__(self, channels: int, config: TrunkConfig, *, rngs: Keys):
        self.group_norm = config.norm(channels, rngs)
        for name in ("to_q", "to_k", "to_v", "to_out_0"):
            setattr(self, name, Linear(channels, channels, dtype=config.dtype, rngs=rngs))

    def __call__(self, x: Array) -> Array:
        B, H, W, C = x.shape
        h = self.group_norm(x).reshape(B, H * W, 1, C)
        mixed = attend(self.to_q(h), self.to_k(h), self.to_v(h))
        return constrain(x + self.to_out_0(mixed.reshape(B, H, W, C)))


class MidBlock(nnx.Module):
    """Two residual blocks, with attention between them unless `mid_block_add_attention` is False."""

    def __init__(self, channels: int, config: TrunkConfig, *, rngs: Keys):
        self.resnets_0 = Resnet(channels, channels, config, rngs=rngs)
        attends = config.mid_block_add_attention
        self.attentions_0 = Attention(channels, config, rngs=rngs) if attends else None
        self.resnets_1 = Resnet(channels, channels, config, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.resnets_0(x)
        return self.resnets_1(x if self.attentions_0 is None else self.attentions_0(x))


class Downsample(nnx.Module):
    """Halves height and width by a convolution that is padded at the bottom and on the right alone."""

    def __init__(self, channels: int, config: TrunkConfig, *, rngs: Keys):
        self.conv = config.conv(channels, channels, rngs, strides=2, padding=((0, 1), (0, 1)))

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width by repeating pixels, then applies a convolution."""

    def __init__(self, channels: int, config: TrunkConfig, *, rngs: Keys):
        self.conv = config.conv(channels, channels, rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(double(x, BOX))


class Level(nnx.Module):
    """Residual blocks `resnets_0`, `resnets_1`, ..., and a resampling called `end`, if any."""

    def __init__(
        self, in_channels: int, out_channels: int, blocks: int, config: TrunkConfig, end: str | None, *, rngs: Keys
    ):
        self.names = tuple(f"resnets_{number}" for number in range(blocks))
        for name in self.names:
            setattr(self, name, Resnet(in_channels, out_channels, config, rngs=rngs))
            in_channels = out_channels
        if end is not None:
            kind = Downsample if end == "downsamplers_0" else Upsample
            setattr(self, end, kind(out_channels, config, rngs=rngs))
            self.names += (end,)

    def __call__(self, x: Array) -> Array:
        for name in self.names:
            x = getattr(self, name)(x)
        return x


class Encoder(nnx.Module):
    """Maps images `[B, H, W, C]` to `[B, h, w, out_channels]`, float32."""

    def __init__(self, out_channels: int, config: TrunkConfig, *, rngs: Keys):
        widths = config.block_out_channels
        self.conv_in = config.conv(config.shape[-1], widths[0], rngs)
        self.names = tuple(f"down_blocks_{level}" for level in range(len(widths)))
        for level, (name, width) in enumerate(zip(self.names, widths, strict=True)):
            end = "downsamplers_0" if level + 1 < len(widths) else None
            before = widths[max(level - 1, 0)]
            setattr(self, name, Level(before, width, config.layers_per_block, config, end, rngs=rngs))
        self.mid_block = MidBlock(widths[-1], config, rngs=rngs)
        self.conv_norm_out = config.norm(widths[-1], rngs)
        self.conv_out = conv3x3(widths[-1], out_channels, dtype=jnp.float32, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.conv_in(x)
        for name in self.names:
            x = getattr(self, name)(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Maps `[B, h, w, in_channels]` to images `[B, H, W, C]`, float32: `conv_out(features(z))`."""

    def __init__(self, in_channels: int, config: TrunkConfig, *, rngs: Keys):
        widths = config.block_out_channels[::-1]
        self.conv_in = config.conv(in_channels, widths[0], rngs)
        self.mid_block = MidBlock(widths[0], config, rngs=rngs)
        self.names = tuple(f"up_blocks_{level}" for level in range(len(widths)))
        for level, (name, width) in enumerate(zip(self.names, widths, strict=True)):
            end = "upsamplers_0" if level + 1 < len(widths) else None
            before = widths[max(level - 1, 0)]
            setattr(self, name, Level(before, width, config.layers_per_block + 1, config, end, rngs=rngs))
        self.conv_norm_out = config.norm(widths[-1], rngs)
        self.conv_out = conv3x3(widths[-1], config.shape[-1], dtype=jnp.float32, rngs=rngs)

    def features(self, z: Array) -> Array:
        """Returns the input of the last convolution."""
        h = self.mid_block(self.conv_in(z))
        for name in self.names:
            h = getattr(self, name)(h)
        return jax.nn.silu(self.conv_norm_out(h))


@dataclasses.dataclass(frozen=True)
class AutoencoderApply:
    """The `apply` of a network that is an autoencoder: pure functions of its parameters.

    Attributes:
      name: The name of the network.
      merge: Returns the module of parameters, with the methods `encode`, `features` and `output`.
      shape: The shape of one image, `(H, W, C)`.
      latent_shape: The shape of one latent, `(h, w, c)`.
      last_layer: The path of the decoder's last convolution in the parameters.
    """

    name: str
    merge: Callable[[Params], Any]
    shape: tuple[int, ...]
    latent_shape: tuple[int, ...]
    last_layer: tuple[str, ...]

    def __call__(self, params: Params, x: Array, c_noise: Array, cond: Cond, *, key: Array | None = None) -> Array:
        raise InputError("network.name", f"{self.name} is an autoencoder, which this objective does not train")

    @property
    def factor(self) -> int:
        """The number of pixels per side of a latent pixel."""
        return self.shape[0] // self.latent_shape[0]

    def encode(self, params: Params, x: Array) -> Array:
        """Encodes images `[B, H, W, C]` in [-1, 1], of any size that `factor` divides.

        Returns:
          What `sample` draws latents from, float32: the moments `[B, h, w, 2 c]` of a variational autoencoder, and
          the latents themselves of others.

        Raises:
          InputError: The channels are others, or the factor does not divide a side.
        """
        check({"x": x}, {"x": (Float, f"batch height width channels={self.shape[-1]}")})
        if x.shape[1] % self.factor or x.shape[2] % self.factor:
            problem = f"height and width must be multiples of {self.factor}, got {x.shape[1]} x {x.shape[2]}"
            raise InputError("network.x", problem)
        return self.merge(params).encode(x)

    def sample(self, encoded: Array, key: Array | None) -> Array:
        """Returns latents `[B, h, w, c]` of what `encode` returns; a key of None takes the most probable ones."""
        return encoded

    def features(self, params: Params, z: Array) -> Array:
        """Returns the input of the decoder's last convolution, `[B, H, W, width]`, for latents `[B, h, w, c]`."""
        check({"z": z}, {"z": (Float, f"batch height width channels={self.latent_shape[-1]}")})
        return self.merge(params).features(z)

    def output(self, params: Params, features: Array) -> Array:
        """Applies the decoder's last convolution: returns images `[B, H, W, C]`, float32, in about [-1, 1]."""
        return self.merge(params).output(features)

    def decode(self, params: Params, z: Array) -> Array:
        """Decodes latents `[B, h, w, c]` to images `[B, H, W, C]`, float32, in about [-1, 1]."""
        return self.output(params, self.features(params, z))
