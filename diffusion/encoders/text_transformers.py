"""The transformers that encode texts: CLIP's text model (Radford et al. 2021, arXiv 2103.00020, section 2.4) and the
encoder of T5 v1.1 (Raffel et al. 2020, arXiv 1910.10683, section 2.1, with the gated GELU of Shazeer 2020, arXiv
2002.05202).

The operands of matrix products are of the compute dtype. Everything else is float32: their results, the sum over the
layers, in which a few channels of T5 are hundreds of times larger than the others, the norms and the softmax.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion.core.types import Array, Params
from diffusion.distributed.activation_sharding import by_example_only
from diffusion.layers.functional import split
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear
from diffusion.layers.stack import Stack

CLIP_WORDS = 49408  # tokens of CLIP's vocabulary, of which the last one ends every text
_LEGACY_END = (
    2  # `eos_token_id` in configs of CLIP from before transformers 4.31, where it is not that of the tokenizer
)
Pooled = Literal["none", "eos", "projected"]


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """The text model of CLIP; the fields are named like the entries of its `config.json`.

    Attributes:
      projection_dim: The width of the projected embedding of the text; 0 for a model without projection.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    hidden_act: Literal["quick_gelu", "gelu"]
    layer_norm_eps: float
    eos_token_id: int
    projection_dim: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The encoder of T5 v1.1; the fields are named like the entries of its `config.json`."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int
    relative_attention_max_distance: int
    layer_norm_epsilon: float
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True)
class TextTransformer:
    """A text transformer as pure functions.

    Attributes:
      init: `init(key) -> params`, float32.
      encode: The forward pass; see `clip` and `t5`.
    """

    init: Callable[[Array], Params]
    encode: Callable[..., Any]


@functools.cache  # a model may be built several times: for its shapes, and to be used
def clip(config: ClipConfig) -> TextTransformer:
    """Returns the text model of CLIP.

    `encode(params, tokens, skip, final_norm, pooled)` maps integers `[B, L]`, of at most `max_position_embeddings`
    tokens, to float32 `(hidden [B, L, C], vector [B, P])`. `hidden` is the state without the last `skip` layers,
    followed by the final norm if `final_norm` is True. Attention is causal, so padding after a text does not affect it.

    `pooled` says what `vector` is. `eos`: the state after all layers and the final norm, at the end of the text.
    `projected`: its projection. `none`: None. The text ends at the first `eos_token_id`. Configs with
    `eos_token_id` = 2 are from before this rule and stand for the largest token, which is that of the end in CLIP's
    vocabulary; where tokens were added to it, the first 49407.
    """
    init, merge = split(lambda rngs: _Clip(config, rngs=rngs))

    @by_example_only
    def encode(
        params: Params, tokens: Array, skip: int = 0, final_norm: bool = True, pooled: Pooled = "none"
    ) -> tuple[Array, Array | None]:
        return merge(params)(tokens, skip, final_norm, pooled)

    return TextTransformer(init, encode)


@functools.cache
def t5(config: T5Config) -> TextTransformer:
    """Returns the encoder of T5 v1.1.

    `encode(params, tokens, mask)` maps integers `[B, L]` to float32 `[B, L, D]`. Tokens where the bool mask `[B, L]` is
    False are not attended to; None: all are.
    """
    init, merge = split(lambda rngs: _T5(config, rngs=rngs))

    @by_example_only
    def encode(params: Params, tokens: Array, mask: Array | None = None) -> Array:
        return merge(params)(tokens, mask)

    return TextTransformer(init, encode)


class _Clip(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: Keys):
        self.config, C = config, config.hidden_size
        self.token_embedding = nnx.Param(0.02 * jax.random.normal(rngs.params(), (config.vocab_size, C)))
        self.position_embedding = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (config.max_position_embeddings, C))
        )
        self.layers = Stack(lambda rngs: _ClipBlock(config, rngs=rngs), config.num_hidden_layers, "none", rngs=rngs)
        self.final_norm = _layer_norm(C, config.layer_norm_eps, rngs)
        if config.projection_dim:
            self.projection = _linear(C, config.projection_dim, config.dtype, rngs, use_bias=False)

    def __call__(
        self, tokens_BxL: Array, skip: int, final_norm: bool, pooled: Pooled
    ) -> tuple[Array, Array | None]:  # fmt: skip
        length, depth = tokens_BxL.shape[1], self.config.num_hidden_layers
        start = jnp.float32(self.token_embedding[tokens_BxL]) + jnp.float32(self.position_embedding[:length])
        causal = jnp.where(np.tri(length, dtype=bool), 0.0, -jnp.inf)[None, None]
        x_BxLxC, kept = self.layers(start, causal, keep=max(depth - 1 - skip, 0))
        kept = start if skip == depth else kept
        end = self.final_norm(x_BxLxC)
        hidden = (self.final_norm(kept) if skip else end) if final_norm else kept
        if pooled == "none":
            return hidden, None
        vector = end[jnp.arange(len(end)), self._end_of(tokens_BxL)]
        return hidden, self.projection(vector) if pooled == "projected" else vector

    def _end_of(self, tokens_BxL: Array) -> Array:
        if self.config.eos_token_id != _LEGACY_END:
            return jnp.argmax(tokens_BxL == self.config.eos_token_id, axis=1)
        if self.config.vocab_size > CLIP_WORDS:
            return jnp.argmax(tokens_BxL == CLIP_WORDS - 1, axis=1)
        return jnp.argmax(tokens_BxL, axis=1)


class _ClipBlock(nnx.Module):
    def __init__(self, config: ClipConfig, *, rngs: Keys):
        self.config, C = config, config.hidden_size
        self.norm1, self.norm2 = (_layer_norm(C, config.layer_norm_eps, rngs) for _ in range(2))
        self.q, self.k, self.v, self.out = (_linear(C, C, config.dtype, rngs) for _ in range(4))
        self.fc1 = _linear(C, config.intermediate_size, config.dtype, rngs)
        self.fc2 = _linear(config.intermediate_size, C, config.dtype, rngs)

    def __call__(self, x_BxLxC: Array, causal: Array) -> Array:
        h, heads = self.norm1(x_BxLxC), self.config.num_attention_heads
        scale = (self.config.hidden_size // heads) ** -0.5
        mixed = _attend(self.q(h) * scale, self.k(h), self.v(h), causal, heads, self.config.dtype)
        x_BxLxC += self.out(mixed)
        h = self.fc1(self.norm2(x_BxLxC))
        h = h * jax.nn.sigmoid(1.702 * h) if self.config.hidden_act == "quick_gelu" else jax.nn.gelu(h, False)
        return x_BxLxC + self.fc2(h)


class _T5(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: Keys):
        self.config = config
        self.token_embedding = nnx.Param(jax.random.normal(rngs.params(), (config.vocab_size, config.d_model)))
        shape = config.relative_attention_num_buckets, config.num_heads
        self.relative_bias = nnx.Param(jax.random.normal(rngs.params(), shape))
        self.layers = Stack(lambda rngs: _T5Block(config, rngs=rngs), config.num_layers, "none", rngs=rngs)
        self.final_norm = _rms_norm(config.d_model, config.layer_norm_epsilon, rngs)

    def __call__(self, tokens_BxL: Array, mask_BxL: Array | None) -> Array:
        config, length = self.config, tokens_BxL.shape[1]
        numbers = buckets(length, config.relative_attention_num_buckets, config.relative_attention_max_distance)
        bias = jnp.float32(self.relative_bias[jnp.asarray(numbers)]).transpose(2, 0, 1)[None]
        if mask_BxL is not None:
            bias = jnp.where(mask_BxL[:, None, None, :], bias, jnp.finfo(jnp.float32).min)
        x_BxLxD = jnp.float32(self.token_embedding[tokens_BxL])
        return self.final_norm(self.layers(x_BxLxD, bias))


class _T5Block(nnx.Module):
    def __init__(self, config: T5Config, *, rngs: Keys):
        self.config, D, inner = config, config.d_model, config.num_heads * config.d_kv
        self.norm1, self.norm2 = (_rms_norm(D, config.layer_norm_epsilon, rngs) for _ in range(2))
        kwargs = dict(dtype=config.dtype, rngs=rngs, use_bias=False)
        self.q, self.k, self.v = (_linear(D, inner, **kwargs) for _ in range(3))
        self.out = _linear(inner, D, **kwargs)
        self.gate, self.up = (_linear(D, config.d_ff, **kwargs) for _ in range(2))
        self.down = _linear(config.d_ff, D, **kwargs)

    def __call__(self, x_BxLxD: Array, bias: Array) -> Array:
        h = self.norm1(x_BxLxD)
        x_BxLxD += self.out(_attend(self.q(h), self.k(h), self.v(h), bias, self.config.num_heads, self.config.dtype))
        h = self.norm2(x_BxLxD)
        return x_BxLxD + self.down(jax.nn.gelu(self.gate(h), True) * self.up(h))


def buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the number of the bucket of each pair of tokens, `[length, length]`, queries first.

    Half of the buckets are for keys after the query. In each half, the first half are for one distance each, and the
    others grow geometrically up to `max_distance`; the last one is for all distances from there on.
    """
    relative = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance, half = np.abs(relative), num_buckets // 2
    exact = half // 2
    # In float32, as in the implementations that the models were trained with: it decides the ends of the buckets.
    steps = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact)) / np.float32(
        math.log(max_distance / exact)
    )
    far = exact + (steps * np.float32(half - exact)).astype(np.int32)
    return np.where(distance < exact, distance, np.minimum(far, half - 1)) + half * (relative > 0)


def _attend(q: Array, k: Array, v: Array, bias: Array, heads: int, dtype: str) -> Array:
    """Returns softmax(q k^T + bias) v for each head; q, k and v are float32 `[B, L, heads * F]`, and the bias can be
    broadcast to `[B, heads, L, L]`."""
    q, k, v = (x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2) for x in (q, k, v))
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    logits = product("bhlf,bhmf->bhlm", q.astype(dtype), k.astype(dtype)) + bias
    mixed = product("bhlm,bhmf->bhlf", jax.nn.softmax(logits).astype(dtype), v.astype(dtype))
    return mixed.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1)


def _linear(inputs: int, outputs: int, dtype: str, rngs: Keys, use_bias: bool = True) -> nnx.Linear:
    return Linear(inputs, outputs, use_bias=use_bias, dtype=jnp.dtype(dtype), preferred_element_type=jnp.float32,
                      rngs=rngs)  # fmt: skip


def _layer_norm(width: int, epsilon: float, rngs: Keys) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs)


def _rms_norm(width: int, epsilon: float, rngs: Keys) -> nnx.RMSNorm:
    return nnx.RMSNorm(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs)
