"""Patches of images, and position encodings for `rows * columns` tokens in row-major order."""

import jax.numpy as jnp
import numpy as np

from diffusion.core.types import Array


def patches(x: Array, size: int) -> Array:
    """Returns the square patches of images `[B, H, W, C]` in row-major order, `[B, H W / size^2, size^2 C]`."""
    B, H, W, C = x.shape
    return x.reshape(B, H // size, size, W // size, size, C).swapaxes(2, 3).reshape(B, -1, size * size * C)


def sincos_2d(rows: int, columns: int, width: int) -> np.ndarray:
    """Returns fixed position embeddings `[rows * columns, width]`: sines and cosines of the column in the first
    half, of the row in the second (Peebles & Xie 2023; Vaswani et al. 2017, arXiv 1706.03762, section 3.5)."""
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))
    row, column = np.divmod(np.arange(rows * columns), columns)
    angles = [np.outer(position, frequencies) for position in (column, row)]
    return np.concatenate([f(angle) for angle in angles for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def rotary_angles(rows: int, columns: int, head_dim: int) -> np.ndarray:
    """Returns the angles `[rows * columns, head_dim / 2]` for `rotate`: the first half depends on the row, the second
    on the column."""
    frequencies = 10_000.0 ** -(np.arange(head_dim // 4) / (head_dim // 4))
    positions = np.divmod(np.arange(rows * columns), columns)
    return np.concatenate([np.outer(position, frequencies) for position in positions], axis=1).astype(np.float32)


def rotate(x: Array, angles: Array) -> Array:
    """Applies rotary position embeddings (Su et al. 2021, arXiv 2104.09864).

    Rotates each pair (i, i + F / 2) of `x [B, N, heads, F]` by its angle `[N, F / 2]`. Products of queries and keys
    then depend on the difference of their positions.
    """
    cos, sin = (f(angles)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
