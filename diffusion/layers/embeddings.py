"""Embeddings of the noise label and of the conditions."""

import math
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion.core.arrays import kept
from diffusion.core.types import Array, Cond
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.keys import Keys


def sinusoidal(labels: Array, width: int, *, freq_shift: int = 0, sin_first: bool = False) -> Array:
    """Returns cosines and sines of `labels [B]` at geometrically spaced frequencies, `[B, width]` (Vaswani et al. 2017,
    arXiv 1706.03762, section 3.5).

    Args:
      labels: The numbers to embed.
      width: The number of features; even.
      freq_shift: With `half = width / 2`, frequency i is exp(-log(10,000) i / (half - freq_shift)). With 0 the lowest
        frequency is just above 1 / 10,000, with 1 it is exactly that.
      sin_first: Whether the sines precede the cosines.
    """
    half = width // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / (half - freq_shift))
    waves = _waves(labels[:, None].astype(jnp.float32) * frequencies)
    return jnp.roll(waves, half, axis=-1) if sin_first else waves


def fourier(labels: Array, width: int, scale: float = 16.0) -> Array:
    """Returns cosines and sines of `labels [B]` at random frequencies from N(0, scale^2), `[B, width]` (Tancik et al.
    2020, arXiv 2006.10739). The frequencies are not parameters: they are the same in every network."""
    frequencies = np.float32(scale * random_waves(width // 2)[0])
    return _waves(2 * np.pi * labels[:, None].astype(jnp.float32) * frequencies)


def fourier_with_phases(labels: Array, width: int, bandwidth: float = 1.0) -> Array:
    """Returns cosines of `labels [B]` at random frequencies from N(0, bandwidth^2) and uniform random phases, both in
    cycles: `[B, width]`, float32, of root mean square 1 (Karras et al. 2023, arXiv 2312.02696, eq. 75). Frequencies and
    phases are not parameters: they are the same in every network."""
    frequencies, phases = random_waves(width)
    cycles = labels[:, None].astype(jnp.float32) * np.float32(bandwidth * frequencies) + np.float32(phases)
    return math.sqrt(2) * jnp.cos(2 * math.pi * cycles)


def random_waves(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns standard normal frequencies and phases uniform in [0, 1), `[count]` each, the same at every call.

    Trained weights depend on these values and checkpoints do not contain them. They are therefore drawn from NumPy's
    `RandomState`, the only generator whose stream NumPy guarantees not to change (NEP 19).
    """
    generator = np.random.RandomState(0)
    return generator.randn(count), generator.rand(count)


def _waves(angles: Array) -> Array:
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class ConditionEmbedding(nnx.Module):
    """The sum of the embeddings of the noise label, the scalar conditions and the class label; `[B, out_features]`.

    Where `keep` is False the class is replaced by the null class, row `num_classes` of the table. Without `null_class`
    there is no such row, and nothing is added there.

    Args:
      width: The width of the features of the noise label.
      out_features: The width of the embedding.
      num_classes: The number of classes; 0 for none.
      scalar_conditions: The names of the scalar conditions; see `ScalarEmbedding`.
      kind: The features of the noise label, `sinusoidal` or `fourier`.
      freq_shift, sin_first: Options of `sinusoidal`.
      null_class: Whether the table of classes has a row for the null class.
      dtype: The compute dtype.
      rngs: The random keys that the parameters are drawn from.
    """

    def __init__(self, width: int, out_features: int, num_classes: int, *, scalar_conditions: tuple[str, ...] = (),
                 kind: Literal["sinusoidal", "fourier"] = "sinusoidal", freq_shift: int = 0, sin_first: bool = False,
                 null_class: bool = True, dtype: Any, rngs: Keys):  # fmt: skip
        if kind == "fourier":
            self.features = partial(fourier, width=width)
        else:
            self.features = partial(sinusoidal, width=width, freq_shift=freq_shift, sin_first=sin_first)
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
            label, keep = cond["label"], kept(cond, "label")
            if self.null_class:
                return constrain(emb_BxD + self.label(jnp.where(keep, label, self.num_classes)))
            emb_BxD += jnp.where(jnp.reshape(keep, (-1, 1)), self.label(label), 0)
        return constrain(emb_BxD)


class ScalarEmbedding(nnx.Module):
    """Adds embeddings of the scalar conditions in `cond` to an embedding `[B, features]`.

    They are zero at initialisation, so a network can start from the weights of one with fewer scalar conditions. A
    condition that is absent from `cond` adds nothing.

    Args:
      scalar_conditions: The names in `cond`: `step_size`, the length of a flow map's step on the scale of the noise
        label, and `guidance_scale`.
      features: The width of the embedding, and of the conditions' sinusoidal features.
      dtype: The compute dtype.
      rngs: The random keys that the parameters are drawn from.
    """

    def __init__(self, scalar_conditions: tuple[str, ...], features: int, *, dtype: Any, rngs: Keys):
        self.features, self.names = features, scalar_conditions
        kwargs = dict(dtype=dtype, rngs=rngs)
        for name in scalar_conditions:
            inner = nnx.Linear(features, features, **kwargs)
            outer = nnx.Linear(features, features, kernel_init=nnx.initializers.zeros, **kwargs)
            setattr(self, name, nnx.Dict({"inner": inner, "outer": outer}))

    def __call__(self, emb_BxD: Array, cond: Cond) -> Array:
        for name in self.names:
            if name in cond:
                part = getattr(self, name)
                emb_BxD += part["outer"](jax.nn.silu(part["inner"](sinusoidal(cond[name], self.features))))
        return emb_BxD
