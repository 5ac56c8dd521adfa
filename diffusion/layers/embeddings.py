"""Embeddings of the noise label and of the condition."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion.core.types import Array, Cond
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.keys import Keys


def sinusoidal(labels: Array, width: int, *, last: bool = False, sin_first: bool = False) -> Array:
    """Cosines and sines of `labels [B]` at `width / 2` geometric frequencies from 1 to 1 / 10,000: `[B, width]`
    (Vaswani et al. 2017, arXiv 1706.03762, section 3.5). The last frequency is reached only if asked for by `last`."""
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / (half - last))
    waves = _waves(labels[:, None].astype(jnp.float32) * frequencies)
    return jnp.roll(waves, half, axis=-1) if sin_first else waves


def fourier(labels: Array, width: int, scale: float = 16.0) -> Array:
    """Cosines and sines of `labels [B]` at `width / 2` normal frequencies of standard deviation `scale`: `[B, width]`
    (Tancik et al. 2020, arXiv 2006.10739). The frequencies are no parameters; they are the same in every network."""
    frequencies = scale * np.random.default_rng(0).standard_normal(width // 2, np.float32)
    return _waves(2 * np.pi * labels[:, None].astype(jnp.float32) * frequencies)


def _waves(angles: Array) -> Array:
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ConditionEmbedding(nnx.Module):
    """What every block is told: the noise label and, if there are classes, the class; `[B, out_features]`.

    Where `keep` is False the class is the null class, row `num_classes` of the table; without `null_class` there is no
    such row and nothing is added.

    Args:
      width: of the noise label's `sinusoidal` or `fourier` features.
      last, sin_first: see `sinusoidal`.
      scalar_conditions: see `ScalarEmbedding`.
    """

    def __init__(self, width: int, out_features: int, num_classes: int, *, scalar_conditions: tuple[str, ...] = (),
                 kind: str = "sinusoidal", last: bool = False, sin_first: bool = False, null_class: bool = True,
                 dtype, rngs: Keys):  # fmt: skip
        if kind == "fourier":
            self.features = partial(fourier, width=width)
        else:
            self.features = partial(sinusoidal, width=width, last=last, sin_first=sin_first)
        self.num_classes, self.null_class = num_classes, null_class
        self.inner = nnx.Linear(width, out_features, dtype=dtype, rngs=rngs)
        self.outer = nnx.Linear(out_features, out_features, dtype=dtype, rngs=rngs)
        if num_classes:
            init = nnx.initializers.normal(0.02)
            rows = num_classes + null_class
            self.label = nnx.Embed(rows, out_features, embedding_init=init, dtype=dtype, rngs=rngs)
        self.numbers = ScalarEmbedding(scalar_conditions, out_features, dtype=dtype, rngs=rngs)

    def __call__(self, c_noise: Array, cond: Cond) -> Array:
        emb_BxD = self.numbers(self.outer(jax.nn.silu(self.inner(self.features(c_noise)))), cond)
        if self.num_classes:
            label, keep = cond["label"], cond.get("keep", True)
            if self.null_class:
                return constrain(emb_BxD + self.label(jnp.where(keep, label, self.num_classes)))
            emb_BxD += jnp.where(jnp.reshape(keep, (-1, 1)), self.label(label), 0)
        return constrain(emb_BxD)


class ScalarEmbedding(nnx.Module):
    """Adds to an embedding `[B, D]` those of the numbers that a network is told beside the noise label; nothing at
    initialisation, so that a network may take over the weights of one that is told fewer.

    Args:
      scalar_conditions: their names in `cond`: `r`, a second time on the scale of the noise label, and `guidance`. One that is
        absent from `cond` adds nothing.
      width: of their sinusoidal features; that of the embedding if None.
    """

    def __init__(
        self, scalar_conditions: tuple[str, ...], features: int, *, width: int | None = None, dtype, rngs: Keys
    ):
        self.width, self.names = width or features, scalar_conditions
        kwargs = dict(dtype=dtype, rngs=rngs)
        for name in scalar_conditions:
            inner = nnx.Linear(self.width, features, **kwargs)
            outer = nnx.Linear(features, features, kernel_init=nnx.initializers.zeros, **kwargs)
            setattr(self, name, nnx.Dict({"inner": inner, "outer": outer}))

    def __call__(self, emb_BxD: Array, cond: Cond) -> Array:
        for name in self.names:
            if name in cond:
                part = getattr(self, name)
                emb_BxD += part["outer"](jax.nn.silu(part["inner"](sinusoidal(cond[name], self.width))))
        return emb_BxD
