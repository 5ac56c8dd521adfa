"""Embeddings of numbers: the noise label and scalar conditions."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion.core.types import Array, Cond
from diffusion.layers.keys import Keys
from diffusion.layers.linear import Linear


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


class SizeEmbedding(nnx.Module):
    """Embeds the size of the image that an example was made from, `[B, features]`: PixArt-alpha's micro-conditions
    (Chen et al. 2023, arXiv 2310.00426, appendix A.2; Podell et al. 2023, arXiv 2307.01952, section 2.2).

    The result is the concatenation of embeddings of the height, the width and the aspect ratio, of equal widths.

    Args:
      features: The width of the embedding; divisible by 3.
      width: The width of the sinusoidal features.
      dtype: The compute dtype.
      rngs: The random keys that the parameters are drawn from.
    """

    def __init__(self, features: int, width: int, *, dtype: Any, rngs: Keys):
        self.width, part = width, features // 3
        for name in ("resolution", "aspect_ratio"):
            inner, outer = (Linear(size, part, dtype=dtype, rngs=rngs) for size in (width, part))
            setattr(self, name, nnx.Dict({"inner": inner, "outer": outer}))

    def __call__(self, resolution_Bx2: Array, aspect_ratio_B: Array) -> Array:
        parts = []
        for layers, values in ((self.resolution, resolution_Bx2), (self.aspect_ratio, aspect_ratio_B)):
            hidden = jax.nn.silu(layers["inner"](sinusoidal(values.reshape(-1), self.width)))
            parts.append(layers["outer"](hidden).reshape(len(values), -1))
        return jnp.concatenate(parts, axis=-1)


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
            inner = Linear(features, features, **kwargs)
            outer = Linear(features, features, kernel_init=nnx.initializers.zeros, **kwargs)
            setattr(self, name, nnx.Dict({"inner": inner, "outer": outer}))

    def __call__(self, emb_BxD: Array, cond: Cond) -> Array:
        for name in self.names:
            if name in cond:
                part = getattr(self, name)
                emb_BxD += part["outer"](jax.nn.silu(part["inner"](sinusoidal(cond[name], self.features))))
        return emb_BxD
