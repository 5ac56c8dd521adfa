"""A text encoder that is trained with the network, from scratch, on the captions of the data."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core import checks
from diffusion.core.types import Array, ConditionSpec, InputError, Text, TextEncoder
from diffusion.encoders import text_conditions, tokenizers
from diffusion.layers.attention import attend
from diffusion.layers.functional import split
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear
from diffusion.layers.norms import layer_norm
from diffusion.layers.stack import Stack

FITTED = 10_000  # captions to which a tokenizer is fitted, at most


class Block(nnx.Module):
    """Self-attention where the mask is True, and an MLP, each after a norm; the identity at initialisation."""

    def __init__(self, width: int, num_heads: int, *, dtype: Any, rngs: Keys):
        self.num_heads = num_heads
        kwargs, zeros = dict(dtype=dtype, rngs=rngs), nnx.initializers.zeros
        self.qkv = Linear(width, 3 * width, **kwargs)
        self.out = Linear(width, width, kernel_init=zeros, **kwargs)
        self.up = Linear(width, 4 * width, **kwargs)
        self.down = Linear(4 * width, width, kernel_init=zeros, **kwargs)

    def __call__(self, x_BxLxD: Array, mask_BxL: Array) -> Array:
        B, L, D = x_BxLxD.shape
        q, k, v = jnp.moveaxis(self.qkv(layer_norm(x_BxLxD, "layer")).reshape(B, L, 3, self.num_heads, -1), 2, 0)
        x_BxLxD += self.out(attend(q, k, v, mask_BxL).reshape(B, L, D))
        return x_BxLxD + self.down(jax.nn.gelu(self.up(layer_norm(x_BxLxD, "layer"))))


class SmallTransformer(nnx.Module):
    """Maps integer tokens `[B, L]` and their mask to vectors `[B, L, width]` and a pooled vector `[B, width]`, the mean
    over the tokens that the mask keeps."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, num_heads: int, *, dtype: Any, rngs: Keys):
        self.dtype, normal = jnp.dtype(dtype), nnx.initializers.normal(0.02)
        self.tokens = nnx.Embed(vocabulary, width, embedding_init=normal, dtype=dtype, rngs=rngs)
        self.positions = nnx.Param(normal(rngs.params(), (length, width), jnp.float32))
        self.blocks = Stack(lambda rngs: Block(width, num_heads, dtype=dtype, rngs=rngs), depth, "none", rngs=rngs)

    def __call__(self, text: Text) -> Text:
        x_BxLxD = self.tokens(text.tokens) + self.positions[...].astype(self.dtype)
        x_BxLxD = layer_norm(self.blocks(x_BxLxD, text.mask), "layer").astype(jnp.float32)
        weights_BxLx1 = text.mask[..., None].astype(jnp.float32)
        pooled_BxD = jnp.sum(x_BxLxD * weights_BxLx1, axis=1) / jnp.maximum(jnp.sum(weights_BxLx1, axis=1), 1)
        return Text(x_BxLxD, text.mask, pooled_BxD)


def make(
    tokenizer: Literal["bpe", "bytes"] = "bpe",
    vocab_size: int = 1024,
    length: int = 64,
    width: int = 128,
    depth: int = 2,
    num_heads: int = 4,
    lowercase: bool = True,
    dtype: Literal["float32", "bfloat16"] = "float32",
    stored: str | None = None,
    captions: Callable[[int], str] | None = None,
    num_captions: int = 0,
) -> TextEncoder:
    """Builds a small transformer whose parameters are trained with those of the network.

    The tokenizer is fitted to the first 10,000 captions when a run starts, and stored in its checkpoints. A dropped
    text is replaced by a learned null embedding of the network.

    Args:
      tokenizer: `bpe`: byte-level byte-pair encoding. `bytes`: the bytes in UTF-8, without fitting. See
        `encoders.tokenizers.fit`.
      vocab_size: The largest number of tokens of `bpe`, at least 259.
      length: The number of tokens of a text, at least 2; longer texts lose their end, with a warning.
      width: The width of the vectors; divisible by `num_heads`.
      depth: The number of blocks.
      num_heads: The number of attention heads.
      lowercase: Whether `bpe` ignores case.
      dtype: The compute dtype.
      stored: The tokenizer that a run has stored; given by the caller.
      captions, num_captions: The captions of the data by index, and their number; given by the caller.

    Raises:
      InputError: A number is out of range, or there are no captions to fit a tokenizer to.
    """
    checks.network_size(width=width, depth=depth, num_heads=num_heads)
    if width % num_heads:
        raise InputError("width", f"must be divisible by num_heads = {num_heads}, got {width}")
    if stored:
        found = tokenizers.from_text(stored)
    elif captions is None and tokenizer != "bytes":
        raise InputError("tokenizer", "is fitted to the captions of the data, and there are none; give the data")
    else:
        first = map(captions, range(min(num_captions, FITTED))) if captions else ()
        found = tokenizers.fit(first, tokenizer, vocab_size, length, lowercase)
    options = width, depth, num_heads
    init, merge = split(
        lambda rngs: SmallTransformer(found.vocabulary, found.length, *options, dtype=jnp.dtype(dtype), rngs=rngs)
    )
    return TextEncoder(
        found,
        ConditionSpec("text", (found.length, width), pooled=width),
        tokenizer=found.to_text(),
        attach=lambda network: text_conditions.attach(network, init, lambda params, text: merge(params)(text)),
    )
