"""The vector-quantised autoencoder of latent diffusion (Esser et al. 2021, arXiv 2012.09841; Rombach et al. 2022, arXiv
2112.10752), `VQModel` of diffusers.

A latent is the vector before it is quantised; the decoder quantises it. The quantiser is a codebook, or rounds each
component (finite scalar quantisation: Mentzer et al. 2023, arXiv 2309.15505).
"""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import NO_CONDITIONS, Array, ConditionSpec, InputError, Network, Params
from diffusion.layers.autoencoder import AutoencoderApply, Decoder, Encoder, TrunkConfig, pointwise
from diffusion.layers.functional import split
from diffusion.layers.keys import Keys


class Quantized(NamedTuple):
    """Quantised vectors.

    Attributes:
      vectors: `[..., d]`. Their gradient is that of the latents before they are replaced by a code or rounded
        (straight-through: Bengio et al. 2013, arXiv 1308.3432), and none reaches the codebook.
      codes: The same values. Their gradient reaches the codebook alone.
      indices: The numbers of the codes, `[...]`.
    """

    vectors: Array
    codes: Array
    indices: Array


def straight_through(z: Array, codes: Array) -> Array:
    """Returns the values of `codes` with the gradient of z."""
    return jax.lax.stop_gradient(codes) + (z - jax.lax.stop_gradient(z))


class Codebook(nnx.Module):
    """Replaces each vector by the nearest of `num` codes (L2)."""

    def __init__(self, num: int, width: int, *, rngs: Keys):
        def initial(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
            return jax.random.uniform(key, shape, dtype, -1 / num, 1 / num)

        self.embedding = nnx.Embed(num, width, embedding_init=initial, rngs=rngs)

    def __call__(self, z: Array) -> Quantized:
        codebook = self.embedding.embedding[...]
        products = jnp.matmul(z, codebook.T, precision=jax.lax.Precision.HIGHEST)
        indices = jnp.argmin(jnp.sum(codebook**2, axis=1) - 2 * products, axis=-1)
        codes = codebook[indices]
        return Quantized(straight_through(z, codes), codes, indices)


class Rounding(nnx.Module):
    """Limits component i to an interval of length levels[i] and rounds it, in units of half of the levels.

    The formulas are those of appendix A.1 of the paper.
    """

    def __init__(self, levels: tuple[int, ...]):
        self.levels = levels

    def __call__(self, z: Array) -> Quantized:
        levels = np.array(self.levels)
        half, offset = (levels - 1) * (1 - 1e-3) / 2, np.where(levels % 2, 0.0, 0.5)
        bounded = jnp.tanh(z + np.tan(offset / half).astype(np.float32)) * half.astype(np.float32) - offset
        numbers = jnp.round(bounded)
        unit, base = levels // 2, np.cumprod([1, *levels[:-1]])
        indices = jnp.sum((numbers.astype(jnp.int32) + unit) * base, axis=-1)
        return Quantized(straight_through(bounded, numbers) / unit, jax.lax.stop_gradient(numbers) / unit, indices)


class AutoencoderVQ(nnx.Module):
    """Encodes images to vectors, and decodes them after quantising them."""

    def __init__(
        self, channels: int, width: int, num: int, fsq_levels: tuple[int, ...], config: TrunkConfig, *, rngs: Keys
    ):
        self.encoder = Encoder(channels, config, rngs=rngs)
        self.quant_conv = pointwise(channels, width, rngs=rngs)
        self.quantize = Rounding(fsq_levels) if fsq_levels else Codebook(num, width, rngs=rngs)
        self.post_quant_conv = pointwise(width, channels, rngs=rngs)
        self.decoder = Decoder(channels, config, rngs=rngs)

    def encode(self, x: Array) -> Array:
        return self.quant_conv(self.encoder(x))

    def features(self, z: Array) -> Array:
        return self.decoder.features(self.post_quant_conv(self.quantize(z).vectors))

    def output(self, features: Array) -> Array:
        return self.decoder.conv_out(features)


class Apply(AutoencoderApply):
    def quantize(self, params: Params, z: Array) -> Quantized:
        """Quantises latents `[B, h, w, c]`, as `decode` does."""
        return self.merge(params).quantize(z)


def make(
    shape: tuple[int, ...],
    num_classes: int = 0,
    conditions: Mapping[str, ConditionSpec] = NO_CONDITIONS,
    latent_channels: int = 3,
    block_out_channels: tuple[int, ...] = (128, 256, 512),
    layers_per_block: int = 2,
    norm_num_groups: int = 32,
    mid_block_add_attention: bool = True,
    num_vq_embeddings: int = 8192,
    vq_embed_dim: int | None = None,
    fsq_levels: tuple[int, ...] = (),
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Network:
    """Builds a vector-quantised autoencoder for images of shape `shape`; its `apply` is an `AutoencoderApply` with the
    method `quantize`.

    The defaults are those of VQ-f4 of latent diffusion.

    Args:
      shape: `(H, W, C)` with H and W divisible by 2 once per level after the first; given by the data. Images of other
        sizes with this divisibility are encoded too.
      num_classes, conditions: The conditions of the data, which an autoencoder does not read. Given by the data.
      latent_channels: The channels of the encoder's output.
      block_out_channels, layers_per_block, norm_num_groups, mid_block_add_attention: See
        `networks.autoencoder_kl.make`.
      num_vq_embeddings: The number of codes, at least 2. It has no effect with `fsq_levels`.
      vq_embed_dim: The components of a code, and of a latent; None: `latent_channels`, or as many as `fsq_levels` has.
      fsq_levels: Quantises by rounding, to this number of levels per component (8, 8, 8, 6, 5 for about 2^14 codes);
        empty: by a codebook.
      dtype: The compute dtype. Parameters, the statistics of norms, latents and the last convolution are float32.
    """
    width = (len(fsq_levels) or latent_channels) if vq_embed_dim is None else vq_embed_dim
    checks.network_size(latent_channels=latent_channels, vq_embed_dim=width)
    checks.at_least(2, num_vq_embeddings=num_vq_embeddings)
    checks.at_most(2**24, num_vq_embeddings, "num_vq_embeddings")
    if fsq_levels and (len(fsq_levels) != width or min(fsq_levels) < 2 or math.prod(fsq_levels) >= 2**31):
        problem = f"must be {width} numbers of at least 2 with a product below 2^31, got {fsq_levels}"
        raise InputError("fsq_levels", problem)
    config = TrunkConfig(shape, block_out_channels, layers_per_block, norm_num_groups, mid_block_add_attention,
                         jnp.dtype(dtype))  # fmt: skip
    init, merge = split(
        lambda rngs: AutoencoderVQ(latent_channels, width, num_vq_embeddings, fsq_levels, config, rngs=rngs)
    )
    latent_shape = (*config.latent_size, width)
    return Network(init, Apply("autoencoder_vq", merge, shape, latent_shape, ("decoder", "conv_out")))
