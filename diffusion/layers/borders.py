"""Where a network's blocks meet, activations stay as the batch is laid out.

A network names the places, `border(x)`, and knows no mesh; who compiles a step over many devices says what is kept
there. Without it the partitioner may gather a batch's activations on every device instead of a block's parameters.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Sharding

_batch = jax.make_user_context(None)  # a part of what `jax.jit` goes by: another value is traced anew


def border(tree: Any) -> Any:
    """The same arrays, whose leading axis is the batch's."""
    place = _batch.value
    return tree if place is None else jax.lax.with_sharding_constraint(tree, place)


def kept(function: Callable, place: Sharding) -> Callable:
    """`function`, traced with every border's arrays laid out as `place`, which splits their leading axis."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with _batch(place):
            return function(*args)

    return traced
