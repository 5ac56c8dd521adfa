"""Applies an encoder or a decoder to one part of its input at a time, so that large images fit into memory."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.core.types import Array
from diffusion.distributed import activation_sharding


def tiled(
    function: Callable[[Array], Array], x: Array, size: int, overlap: int, output_size: int, output_overlap: int
) -> Array:
    """Applies a function to overlapping square tiles and blends the results linearly where they overlap.

    The tiles start at the multiples of `size - overlap`; those at the bottom and on the right may be smaller. Each is
    blended with the blended tile above, and then with that on the left, as in diffusers.

    Args:
      function: Maps `[B, h, w, C]` to `[B, h', w', D]`, whose size is proportional.
      x: `[B, H, W, C]`.
      size, overlap: The side of a tile and of the overlap of two tiles, at most half of it.
      output_size, output_overlap: The same in the result of `function`.

    Returns:
      `[B, H', W', D]`. x itself is one tile if no side exceeds `size`.
    """
    if max(x.shape[1:3]) <= size:
        return function(x)
    step, output_step = size - overlap, output_size - output_overlap
    rows, columns = (range(0, length, step) for length in x.shape[1:3])
    places = list(itertools.product(rows, columns))
    shapes = {(i, j): x[:, i : i + size, j : j + size].shape for i, j in places}
    tiles = {}
    for shape in dict.fromkeys(shapes.values()):  # the tiles of one shape share what is compiled
        alike = [place for place in places if shapes[place] == shape]
        stacked = jnp.stack([x[:, i : i + size, j : j + size] for i, j in alike])
        tiles |= zip(alike, jax.lax.map(function, stacked), strict=True)
    for i, j in places:
        if i > 0:
            tiles[i, j] = _blended(tiles[i - step, j], tiles[i, j], output_overlap, axis=1)
        if j > 0:
            tiles[i, j] = _blended(tiles[i, j - step], tiles[i, j], output_overlap, axis=2)
    return jnp.concatenate(
        [jnp.concatenate([tiles[i, j][:, :output_step, :output_step] for j in columns], axis=2) for i in rows], axis=1
    )


def _blended(before: Array, tile: Array, overlap: int, axis: int) -> Array:
    """Returns a tile whose first rows (axis 1) or columns (axis 2) go over from those at the end of another tile."""
    overlap = min(before.shape[axis], tile.shape[axis], overlap)
    ramp = jnp.arange(overlap, dtype=tile.dtype) / max(overlap, 1)
    ramp = ramp.reshape([-1 if number == axis else 1 for number in range(4)])
    end = jax.lax.slice_in_dim(before, before.shape[axis] - overlap, None, axis=axis)
    start, rest = jnp.split(tile, [overlap], axis=axis)
    return jnp.concatenate([end * (1 - ramp) + start * ramp, rest], axis=axis)


def one_by_one(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Returns a function that applies `function` to one example of a batch `[B, ...]` at a time.

    If the batch is sharded over devices, each of them processes its shard in this way.
    """

    def apply(x: Array) -> Array:
        shards = activation_sharding.num_shards(len(x))
        parts = x.reshape(shards, -1, *x.shape[1:]).swapaxes(0, 1)  # one example of every shard each
        y = jax.lax.map(lambda part: function(activation_sharding.constrain(part)), parts)
        return y.swapaxes(0, 1).reshape(len(x), *y.shape[2:])

    return apply
