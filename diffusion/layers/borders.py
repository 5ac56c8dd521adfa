"""Where a network's blocks meet, activations stay as the batch is laid out.

A network names the places, `border(x)`, and knows no mesh; who compiles a step over many devices says what is kept
there. Without it the partitioner may gather a batch's activations on every device instead of a block's parameters.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding

from diffusion.types import Array

_batch = jax.make_user_context(None)  # a part of what `jax.jit` goes by: another value is traced anew


def border(x: Array) -> Array:
    """The same array, `[B, ...]`. A part of a batch that the devices do not divide is left to the compiler."""
    place = _batch.value
    if place is None or len(x) % _parts(place):
        return x
    return jax.lax.with_sharding_constraint(x, place)


def kept(function: Callable, place: NamedSharding) -> Callable:
    """`function`, traced with every border's arrays laid out as `place`, which splits their leading axis."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with _batch(place):
            return function(*args)

    return traced


def _parts(place: NamedSharding) -> int:
    axes = place.spec[0]
    return math.prod(place.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
