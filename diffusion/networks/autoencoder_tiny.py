"""The tiny autoencoder of Stable Diffusion's latents (TAESD: github.com/madebyollin/taesd), `AutoencoderTiny` of
diffusers.

It has no norms, and its latents need no scale. It is for previews, and for training on latents of other autoencoders.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import NO_CONDITIONS, Array, ConditionSpec, InputError, Network
from diffusion.layers.autoencoder import AutoencoderApply, check_levels
from diffusion.layers.functional import split
from diffusion.layers.keys import Keys
from diffusion.layers.resample import BOX, double
from diffusion.layers.residual import conv3x3


class Block(nnx.Module):
    """Three convolutions with relu, added to x, and relu."""

    def __init__(self, width: int, *, dtype: Any, rngs: Keys):
        for name in ("conv_0", "conv_2", "conv_4"):
            setattr(self, name, conv3x3(width, width, dtype=dtype, rngs=rngs))

    def __call__(self, x: Array) -> Array:
        h = jax.nn.relu(self.conv_2(jax.nn.relu(self.conv_0(x))))
        return jax.nn.relu(x + self.conv_4(h))


class Layers(nnx.Module):
    """Functions applied in sequence, `layers_0`, `layers_1`, ..."""

    def __init__(self, layers: Sequence[Callable[[Array], Array]]):
        self.num = len(layers)
        for number, layer in enumerate(layers):
            setattr(self, f"layers_{number}", layer)

    def __call__(self, x: Array) -> Array:
        return self.last(self.before_last(x))

    def before_last(self, x: Array) -> Array:
        for number in range(self.num - 1):
            x = getattr(self, f"layers_{number}")(x)
        return x

    def last(self, x: Array) -> Array:
        return getattr(self, f"layers_{self.num - 1}")(x)


def repeat(x: Array) -> Array:
    """Doubles height and width by repeating pixels."""
    return double(x, BOX)


class AutoencoderTiny(nnx.Module):
    """Encodes images to latents of a scale of about 1, limited to (-3, 3) before they are decoded."""

    def __init__(
        self, channels: int, latent_channels: int, encoder: tuple[tuple[int, int], ...],
        decoder: tuple[tuple[int, int], ...], dtype: Any, *, rngs: Keys,
    ):  # fmt: skip
        kwargs = dict(dtype=dtype, rngs=rngs)
        layers: list[Callable[[Array], Array]] = []
        for level, (width, blocks) in enumerate(encoder):
            if level:
                layers.append(conv3x3(width, width, strides=2, bias=False, **kwargs))
            else:
                layers.append(conv3x3(channels, width, **kwargs))
            layers += [Block(width, **kwargs) for _ in range(blocks)]
        self.encoder = Layers([*layers, conv3x3(encoder[-1][0], latent_channels, dtype=jnp.float32, rngs=rngs)])
        layers = [conv3x3(latent_channels, decoder[0][0], **kwargs), jax.nn.relu]
        for level, (width, blocks) in enumerate(decoder):
            layers += [Block(width, **kwargs) for _ in range(blocks)]
            if level + 1 < len(decoder):
                layers += [repeat, conv3x3(width, width, bias=False, **kwargs)]
        self.decoder = Layers([*layers, conv3x3(decoder[-1][0], channels, dtype=jnp.float32, rngs=rngs)])

    def encode(self, x: Array) -> Array:
        return self.encoder((x + 1) / 2)

    def features(self, z: Array) -> Array:
        return self.decoder.before_last(3 * jnp.tanh(z / 3))

    def output(self, features: Array) -> Array:
        return 2 * self.decoder.last(features) - 1


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    conditions: Mapping[str, ConditionSpec] = NO_CONDITIONS,
    latent_channels: int = 4,
    encoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
    num_encoder_blocks: tuple[int, ...] = (1, 3, 3, 3),
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64),
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1),
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """Builds a tiny autoencoder for images of shape `shape`; its `apply` is an `AutoencoderApply`.

    Args:
      shape: `(H, W, C)` with H and W divisible by 2 once per level after the first; given by the data. Images of other
        sizes with this divisibility are encoded too.
      num_classes, conditions: The conditions of the data, which an autoencoder does not read. Given by the data.
      latent_channels: The channels of a latent.
      encoder_block_out_channels: The channels of each level of the encoder, all equal. The image is halved between two
        levels.
      num_encoder_blocks: The number of residual blocks of each level of the encoder.
      decoder_block_out_channels, num_decoder_blocks: The same for the decoder, which begins with the smallest image.
      dtype: The compute dtype. Parameters, latents and the last convolution are float32.
    """
    checks.network_size(latent_channels=latent_channels)
    check_levels(shape, "encoder_block_out_channels", encoder_block_out_channels)
    levels = len(encoder_block_out_channels)
    for side, widths, blocks in (("encoder", encoder_block_out_channels, num_encoder_blocks),
                                 ("decoder", decoder_block_out_channels, num_decoder_blocks)):  # fmt: skip
        if len(widths) != levels or len(set(widths)) > 1 or widths[0] < 1:
            raise InputError(f"{side}_block_out_channels", f"must be {levels} equal positive numbers, got {widths}")
        if len(blocks) != levels or min(blocks) < 0:
            raise InputError(f"num_{side}_blocks", f"must be {levels} numbers of at least 0, got {blocks}")
        checks.at_most(1000, sum(blocks), f"num_{side}_blocks")
    encoder = tuple(zip(encoder_block_out_channels, num_encoder_blocks, strict=True))
    decoder = tuple(zip(decoder_block_out_channels, num_decoder_blocks, strict=True))
    channels = shape[-1]
    init, merge = split(
        lambda rngs: AutoencoderTiny(channels, latent_channels, encoder, decoder, jnp.dtype(dtype), rngs=rngs)
    )
    factor, last = 2 ** (levels - 1), f"layers_{2 * levels + sum(num_decoder_blocks)}"
    latent_shape = (shape[0] // factor, shape[1] // factor, latent_channels)
    return Network(init, AutoencoderApply("autoencoder_tiny", merge, shape, latent_shape, ("decoder", last)))
