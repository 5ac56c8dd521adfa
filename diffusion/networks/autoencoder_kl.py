"""The variational autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752), `AutoencoderKL` of
diffusers."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import NO_CONDITIONS, Array, ConditionSpec, Network
from diffusion.layers.autoencoder import AutoencoderApply, Decoder, Encoder, TrunkConfig, pointwise
from diffusion.layers.functional import split
from diffusion.layers.keys import Keys


class AutoencoderKL(nnx.Module):
    """Encodes images to the moments of a Gaussian, and decodes its samples."""

    def __init__(self, channels: int, quant: bool, post_quant: bool, config: TrunkConfig, *, rngs: Keys):
        self.encoder = Encoder(2 * channels, config, rngs=rngs)
        self.quant_conv = pointwise(2 * channels, 2 * channels, rngs=rngs) if quant else None
        self.post_quant_conv = pointwise(channels, channels, rngs=rngs) if post_quant else None
        self.decoder = Decoder(channels, config, rngs=rngs)

    def encode(self, x: Array) -> Array:
        h = self.encoder(x)
        return h if self.quant_conv is None else self.quant_conv(h)

    def features(self, z: Array) -> Array:
        return self.decoder.features(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def output(self, features: Array) -> Array:
        return self.decoder.conv_out(features)


def moments(encoded: Array) -> tuple[Array, Array]:
    """Returns the mean and the logarithm of the variance, which is limited to [-30, 20], of an encoded image."""
    mean, log_variance = jnp.split(encoded, 2, axis=-1)
    return mean, jnp.clip(log_variance, -30.0, 20.0)


class Apply(AutoencoderApply):
    def kl(self, encoded: Array) -> Array:
        """Returns the divergence `[B]` of the Gaussians from N(0, 1), summed over the latent, from what `encode`
        returns."""
        mean, log_variance = moments(encoded)
        return 0.5 * jnp.sum(mean**2 + jnp.exp(log_variance) - 1 - log_variance, axis=(1, 2, 3))

    def sample(self, encoded: Array, key: Array | None) -> Array:
        mean, log_variance = moments(encoded)
        if key is None:
            return mean
        return mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape, mean.dtype)


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    conditions: Mapping[str, ConditionSpec] = NO_CONDITIONS,
    latent_channels: int = 4,
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
    layers_per_block: int = 2,
    norm_num_groups: int = 32,
    mid_block_add_attention: bool = True,
    use_quant_conv: bool = True,
    use_post_quant_conv: bool = True,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """Builds a variational autoencoder for images of shape `shape`; its `apply` is an `AutoencoderApply`.

    The defaults are those of Stable Diffusion 1.

    Args:
      shape: `(H, W, C)` with H and W divisible by 2 once per level after the first; given by the data. Images of other
        sizes with this divisibility are encoded too.
      num_classes, conditions: The conditions of the data, which an autoencoder does not read. Given by the data.
      latent_channels: The channels of a latent.
      block_out_channels: The channels of each level. The image is halved between two levels.
      layers_per_block: The number of residual blocks per level of the encoder; one more in the decoder.
      norm_num_groups: The number of groups of every group norm; must divide the channels of every level.
      mid_block_add_attention: Whether there is self-attention at the smallest resolution.
      use_quant_conv: Whether a 1x1 convolution follows the encoder.
      use_post_quant_conv: Whether a 1x1 convolution precedes the decoder.
      dtype: The compute dtype. Parameters, the statistics of norms, moments and the last convolution are float32.
    """
    checks.network_size(latent_channels=latent_channels)
    config = TrunkConfig(shape, block_out_channels, layers_per_block, norm_num_groups, mid_block_add_attention,
                         jnp.dtype(dtype))  # fmt: skip
    init, merge = split(
        lambda rngs: AutoencoderKL(latent_channels, use_quant_conv, use_post_quant_conv, config, rngs=rngs)
    )
    latent_shape = (*config.latent_size, latent_channels)
    return Network(init, Apply("autoencoder_kl", merge, shape, latent_shape, ("decoder", "conv_out")))
