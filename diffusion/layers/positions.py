"""Where a token stands in a square of `side * side` tokens, row by row."""

import jax.numpy as jnp
import numpy as np

from diffusion.core.types import Array


def sincos_2d(side: int, width: int) -> np.ndarray:
    """Fixed embeddings `[side^2, width]`: sines and cosines of the column in the first half, of the row in the second
    (Peebles & Xie 2023; Vaswani et al. 2017, arXiv 1706.03762, section 3.5)."""
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    rows, columns = np.divmod(np.arange(side**2), side)
    angles = [np.outer(place, frequencies) for place in (columns, rows)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def rotary_angles(side: int, head_dim: int) -> np.ndarray:
    """The angles that `rotate` turns a head's pairs by, `[side^2, head_dim / 2]`: by the row in the first half, by
    the column in the second."""
    frequencies = 10_000.0 ** -(np.arange(head_dim // 4) / (head_dim // 4))
    places = np.divmod(np.arange(side**2), side)
    return np.concatenate([np.outer(place, frequencies) for place in places], axis=1).astype(np.float32)


def rotate(x: Array, angles: Array) -> Array:
    """`x [B, N, heads, F]` with each pair (i, i + F / 2) turned by its angle `[N, F / 2]` (Su et al. 2021, arXiv
    2104.09864): products of queries and keys then depend on the difference of their places."""
    cos, sin = (f(angles)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
