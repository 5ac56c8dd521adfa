"""Turns the noise label and the conditions into what the blocks of a network see: a vector, and a sequence of tokens.

label, numbers, vectors, pooled text   ->  vector [B, D]
tokens of texts                        ->  sequence [B, L, D] and mask [B, L]
images                                 ->  channels next to those of x (`images_of`)
"""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core.arrays import expand, kept
from diffusion.core.types import LABEL_NOISE, NO_CONDITIONS, NULL, Array, Cond, ConditionSpec, InputError, Text
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.embeddings import ScalarEmbedding, fourier, sinusoidal
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear

NORMAL = nnx.initializers.normal(1)  # tokens of unit variance, like those of text encoders


class Embedded(NamedTuple):
    """The conditions as the blocks of a network see them.

    Attributes:
      vector: `[B, D]`.
      sequence: The tokens of all texts, `[B, L, D]`; None without texts.
      mask: Bool `[B, L]`, which tokens are attended to; None without texts.
    """

    vector: Array
    sequence: Array | None = None
    mask: Array | None = None


class Conditioner(nnx.Module):
    """Embeds the noise label and all conditions.

    Where the label is not kept it is replaced by the null class, row `num_classes` of the table. Without `null_class`
    there is no such row, and nothing is added there.

    Args:
      width: The width of the features of the noise label.
      out_features: The width D of the vector and of the sequence.
      num_classes: The number of classes; 0 for none.
      conditions: The data's conditions other than the label; see `ConditionEmbedding`.
      scalar_conditions: The names of the scalars of objectives and guidance; see `ScalarEmbedding`.
      kind: The features of the noise label, `sinusoidal` or `fourier`.
      scale: The standard deviation of the frequencies of `fourier`.
      freq_shift, sin_first: Options of `sinusoidal`.
      null_class: Whether the table of classes has a row for the null class.
      text_mlp, null_text: See `TextEmbedding`.
      dtype: The compute dtype.
      rngs: The random keys that the parameters are drawn from.
    """

    def __init__(self, width: int, out_features: int, num_classes: int, *,
                 conditions: Mapping[str, ConditionSpec] = NO_CONDITIONS, scalar_conditions: tuple[str, ...] = (),
                 kind: Literal["sinusoidal", "fourier"] = "sinusoidal", scale: float = 16.0, freq_shift: int = 0,
                 sin_first: bool = False, null_class: bool = True, text_mlp: bool = False, null_text: bool = True,
                 dtype: Any, rngs: Keys):  # fmt: skip
        if kind == "fourier":
            self.features = partial(fourier, width=width, scale=scale)
        else:
            self.features = partial(sinusoidal, width=width, freq_shift=freq_shift, sin_first=sin_first)
        self.num_classes, self.null_class = num_classes, null_class
        self.inner = Linear(width, out_features, dtype=dtype, rngs=rngs)
        self.outer = Linear(out_features, out_features, dtype=dtype, rngs=rngs)
        if num_classes:
            init = nnx.initializers.normal(0.02)
            rows = num_classes + null_class
            self.label = nnx.Embed(rows, out_features, embedding_init=init, dtype=dtype, rngs=rngs)
        self.numbers = ScalarEmbedding(scalar_conditions, out_features, dtype=dtype, rngs=rngs)
        text = dict(text_mlp=text_mlp, null_text=null_text)
        self.conditions = ConditionEmbedding(conditions, out_features, **text, dtype=dtype, rngs=rngs)

    def __call__(self, c_noise: Array, cond: Cond, offset: Array | float = 0.0) -> Embedded:
        """Embeds c_noise `[B]`, to whose features `offset [B, width]` is added, and the conditions."""
        emb_BxD = self.numbers(self.outer(jax.nn.silu(self.inner(self.features(c_noise) + offset))), cond)
        if self.num_classes:
            label, keep = cond["label"], kept(cond, "label")
            if self.null_class:
                emb_BxD += with_noise(self.label(jnp.where(keep, label, self.num_classes)), cond)
            else:
                emb_BxD += jnp.where(jnp.reshape(keep, (-1, 1)), with_noise(self.label(label), cond), 0)
        embedded = self.conditions(emb_BxD, cond)
        return embedded._replace(vector=constrain(embedded.vector))


class ConditionEmbedding(nnx.Module):
    """Adds numbers, vectors and pooled texts to an embedding `[B, features]`, and embeds the tokens of texts.

    What is added is zero at initialisation, so that a network can start from the weights of one without these
    conditions. Values that are not kept, and texts without any token, are replaced by learned null values. `text_mlp`
    and `null_text` are options of `TextEmbedding`.
    """

    def __init__(self, conditions: Mapping[str, ConditionSpec], features: int, *, text_mlp: bool = False,
                 null_text: bool = True, dtype: Any, rngs: Keys):  # fmt: skip
        self.features, self.null_text = features, null_text
        self.names = tuple(sorted(name for name, spec in conditions.items() if spec.kind != "image"))
        vectors, texts = {}, {}
        for name in self.names:
            spec = conditions[name]
            width = {"scalar": features, "vector": math.prod(spec.shape), "text": spec.pooled}[spec.kind]
            if width:
                vectors[name] = VectorEmbedding(width, features, dtype=dtype, rngs=rngs)
            if spec.kind == "text":
                texts[name] = TextEmbedding(spec, features, mlp=text_mlp, null=null_text, dtype=dtype, rngs=rngs)
        self.vectors, self.texts = nnx.Dict(vectors), nnx.Dict(texts)

    def __call__(self, emb_BxD: Array, cond: Cond) -> Embedded:
        tokens = []
        for name in self.names:
            value, keep = cond[name], jnp.broadcast_to(kept(cond, name), emb_BxD.shape[:1])
            if name in self.texts:
                if not self.null_text and kept(cond, name) is not True:
                    problem = "cannot be dropped: the network has no null text; give the text that replaces it"
                    raise InputError(f"network.{name}", f"{problem} in cond[{NULL!r}]")
                keep &= value.mask.any(axis=1)
                tokens.append(self.texts[name](value, keep))
                value = value.pooled
            elif value.ndim == 1:
                value = sinusoidal(value, self.features)
            if name in self.vectors:
                emb_BxD += self.vectors[name](value, keep)
        if not tokens:
            return Embedded(emb_BxD)
        sequences, masks = zip(*tokens, strict=True)
        return Embedded(emb_BxD, jnp.concatenate(sequences, axis=1), jnp.concatenate(masks, axis=1))


class VectorEmbedding(nnx.Module):
    """Maps vectors `[B, width]` to `[B, features]`; zero at initialisation, with a learned null vector."""

    def __init__(self, width: int, features: int, *, dtype: Any, rngs: Keys):
        self.null = nnx.Param(jnp.zeros(width))
        self.inner = Linear(width, features, dtype=dtype, rngs=rngs)
        self.outer = Linear(features, features, kernel_init=nnx.initializers.zeros, dtype=dtype, rngs=rngs)

    def __call__(self, value_BxP: Array, keep_B: Array) -> Array:
        value_BxP = jnp.where(keep_B[:, None], value_BxP, self.null[...])
        return self.outer(jax.nn.silu(self.inner(value_BxP)))


class TextEmbedding(nnx.Module):
    """Maps the tokens of a text to a sequence `[B, L, features]` and its mask.

    Integer tokens are looked up in a table, and a learned embedding of the position is added. Vectors are mapped by a
    linear layer, or with `mlp` by two with a GELU between them (PixArt-alpha: Chen et al. 2023, arXiv 2310.00426). A
    text that is not kept becomes one null token, unless `null` is False: then every text must be kept. What padding
    holds has no effect.
    """

    def __init__(
        self, spec: ConditionSpec, features: int, *, mlp: bool = False, null: bool = True, dtype: Any, rngs: Keys
    ):
        self.dtype, self.vocabulary, self.mlp, self.has_null = jnp.dtype(dtype), spec.vocabulary, mlp, null
        kwargs = dict(dtype=dtype, rngs=rngs)
        if spec.vocabulary:
            self.tokens = nnx.Embed(spec.vocabulary, features, embedding_init=NORMAL, **kwargs)
            small = nnx.initializers.normal(0.02)
            self.positions = nnx.Param(small(rngs.params(), (spec.shape[0], features), jnp.float32))
        elif mlp:
            self.inner = Linear(spec.shape[1], features, **kwargs)
            self.outer = Linear(features, features, **kwargs)
        else:
            self.tokens = Linear(spec.shape[1], features, **kwargs)
        if null:
            self.null = nnx.Param(NORMAL(rngs.params(), (features,), jnp.float32))

    def __call__(self, text: Text, keep_B: Array) -> tuple[Array, Array]:
        if self.vocabulary:
            tokens_BxLxD = self.tokens(jnp.where(text.mask, text.tokens, 0)) + self.positions[...].astype(self.dtype)
        else:
            tokens_BxLxD = jnp.where(text.mask[..., None], text.tokens, 0)
            if self.mlp:
                tokens_BxLxD = self.outer(jax.nn.gelu(self.inner(tokens_BxLxD), approximate=True))
            else:
                tokens_BxLxD = self.tokens(tokens_BxLxD)
        if not self.has_null:
            return tokens_BxLxD, text.mask
        first_L = jnp.arange(tokens_BxLxD.shape[1]) == 0
        null_LxD = jnp.where(first_L[:, None], self.null[...].astype(self.dtype), 0)
        sequence_BxLxD = jnp.where(keep_B[:, None, None], tokens_BxLxD, null_LxD)
        return sequence_BxLxD, jnp.where(keep_B[:, None], text.mask, first_L)


def with_noise(label_BxD: Array, cond: Cond) -> Array:
    """Returns the embeddings of the labels, with the noise that `cond` may hold where the label is kept."""
    if LABEL_NOISE not in cond:
        return label_BxD
    return jnp.where(jnp.reshape(kept(cond, "label"), (-1, 1)), cond[LABEL_NOISE](label_BxD), label_BxD)


def has_text(conditions: Mapping[str, ConditionSpec]) -> bool:
    """Returns whether there is a sequence to attend to."""
    return any(spec.kind == "text" for spec in conditions.values())


def image_channels(conditions: Mapping[str, ConditionSpec]) -> int:
    """Returns the number of channels of all images among the conditions."""
    return sum(spec.shape[-1] for spec in conditions.values() if spec.kind == "image")


def images_of(conditions: Mapping[str, ConditionSpec], cond: Cond) -> Array:
    """Returns the images among the conditions, `[B, H, W, C]`, with their channels concatenated in the order of names;
    images that are not kept are 0.

    A network adds their linear map, without a bias and zero at initialisation, to that of x. This equals a map of the
    concatenated channels, and a network can start from the weights of one without images.
    """
    images = {name: cond[name] for name, spec in sorted(conditions.items()) if spec.kind == "image"}
    return jnp.concatenate(
        [jnp.where(expand(jnp.asarray(kept(cond, name)), image), image, 0) for name, image in images.items()], axis=-1
    )
