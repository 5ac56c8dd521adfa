"""Pins the sharding of activations at the boundaries of a network's blocks.

Networks mark the boundaries by `constrain(x)` and do not depend on a mesh. The code that compiles a step for several
devices switches the constraints on by `enabled`. Without them, XLA's partitioner may gather a batch's activations on
every device instead of a block's parameters.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from diffusion.core.types import Array, InputError

# (batch_sharding, sequence_axis) or None; part of the cache key of `jax.jit`, so a new value causes a new trace.
_sharding = jax.make_user_context(None)


def constrain(x: Array) -> Array:
    """Constrains the sharding of x `[B, ...]` inside a function that is `enabled`; elsewhere returns x as it is.

    The leading axis is sharded like the batch, and the second axis of tokens `[B, N, D]` over the mesh axis
    `sequence_axis` if that is set. An x whose leading axis is not divisible by its number of shards is left to the
    compiler.

    Raises:
      InputError: if the number of tokens is not divisible by the size of `sequence_axis`.
    """
    if _sharding.value is None:
        return x
    sharding, sequence_axis = _sharding.value
    mesh, batch_axes = sharding.mesh, sharding.spec[0]
    if len(x) % _num_shards(sharding):
        return x
    if x.ndim == 3 and sequence_axis is not None:
        if x.shape[1] % mesh.shape[sequence_axis]:
            problem = f"mesh.{sequence_axis} = {mesh.shape[sequence_axis]} must divide the {x.shape[1]} tokens; "
            raise InputError("sharding.sequence", problem + "change mesh, or set sharding.sequence to None")
        sharding = NamedSharding(mesh, PartitionSpec(batch_axes, sequence_axis))
    return jax.lax.with_sharding_constraint(x, sharding)


def num_shards(size: int) -> int:
    """Returns the number of parts into which `constrain` shards a leading axis of a size; 1 if it does not."""
    if _sharding.value is None:
        return 1
    count = _num_shards(_sharding.value[0])
    return 1 if size % count else count


def enabled(function: Callable, batch_sharding: NamedSharding, sequence_axis: str | None = None) -> Callable:
    """Returns `function` with the constraints of `constrain` switched on while it is traced.

    Args:
      function: The function to compile, such as a train step.
      batch_sharding: The sharding of a batch, which shards the leading axis.
      sequence_axis: The mesh axis that shards the tokens of a transformer, or None (`sharding.sequence`).
    """

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with _sharding((batch_sharding, sequence_axis)):
            return function(*args)

    return traced


def by_example_only(function: Callable) -> Callable:
    """Returns `function` with tokens that `constrain` shards by example alone while it is traced.

    For text encoders inside a train step, whose tokens need not be divisible by the size of `sequence_axis`.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with _sharding(_sharding.value and (_sharding.value[0], None)):
            return function(*args, **kwargs)

    return traced


def _num_shards(sharding: NamedSharding) -> int:
    axes = sharding.spec[0]
    return math.prod(sharding.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
