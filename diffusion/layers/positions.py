"""Patches of images, and position encodings for `rows * columns` tokens in row-major order."""

import jax.numpy as jnp
import numpy as np

from diffusion.core.types import Array


def patches(x: Array, size: int) -> Array:
    """Returns the square patches of images `[B, H, W, C]` in row-major order, `[B, H W / size^2, size^2 C]`."""
    B, H, W, C = x.shape
    return x.reshape(B, H // size, size, W // size, size, C).swapaxes(2, 3).reshape(B, -1, size * size * C)


def sincos_2d(rows: int, columns: int, width: int, spacing: tuple[float, float] = (1, 1)) -> np.ndarray:
    """Returns fixed position embeddings `[rows * columns, width]`: sines and cosines of the column in the first
    half, of the row in the second (Peebles & Xie 2023; Vaswani et al. 2017, arXiv 1706.03762, section 3.5).

    Neighbouring rows, and neighbouring columns, differ by `spacing` in position.
    """
    row, column = _angles(rows, columns, width // 4, spacing)
    return np.concatenate([f(angle) for angle in (column, row) for f in (np.sin, np.cos)], axis=1).astype(np.float32)


def rotary_angles(rows: int, columns: int, head_dim: int, spacing: tuple[float, float] = (1, 1)) -> np.ndarray:
    """Returns the angles `[rows * columns, head_dim / 2]` for `rotate`: the first half depends on the row, the second
    on the column. `spacing` is that of `sincos_2d`."""
    return np.concatenate(_angles(rows, columns, head_dim // 4, spacing), axis=1).astype(np.float32)


def _angles(rows: int, columns: int, num: int, spacing: tuple[float, float]) -> list[np.ndarray]:
    """Returns the row and the column of each token, times `num` frequencies, `[rows * columns, num]` each."""
    frequencies = 10_000.0 ** -(np.arange(num) / num)
    positions = np.divmod(np.arange(rows * columns), columns)
    return [np.outer(position * step, frequencies) for position, step in zip(positions, spacing, strict=True)]


def rotate(x: Array, angles: Array) -> Array:
    """Applies rotary position embeddings (Su et al. 2021, arXiv 2104.09864).

    Rotates each pair (i, i + F / 2) of `x [B, N, heads, F]` by its angle `[N, F / 2]`. Products of queries and keys
    then depend on the difference of their positions.
    """
    cos, sin = (f(angles)[None, :, None, :].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
