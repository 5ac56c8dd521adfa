"""Where a network's blocks meet, activations stay as the batch is laid out.

A network names the places, `constrain(x)`, and knows no mesh; who compiles a step over many devices says what is kept
there. Without it the partitioner may gather a batch's activations on every device instead of a block's parameters.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from diffusion.core.types import Array, InputError

_kept = jax.make_user_context(None)  # a part of what `jax.jit` goes by: another value is traced anew


def constrain(x: Array) -> Array:
    """The same array, `[B, ...]`; tokens are `[B, N, D]`. A part of a batch that the devices do not divide is left to
    the compiler.

    Raises:
      InputError: the tokens are to be split, and cannot be.
    """
    if _kept.value is None:
        return x
    place, sequence = _kept.value
    mesh, axes = place.mesh, place.spec[0]
    if len(x) % _parts(place):
        return x
    if x.ndim == 3 and sequence is not None:
        if x.shape[1] % mesh.shape[sequence]:
            problem = f"splits tokens over the {mesh.shape[sequence]} devices of mesh.{sequence}, which do not divide"
            raise InputError("sharding.sequence", f"{problem} the {x.shape[1]} there are")
        place = NamedSharding(mesh, PartitionSpec(axes, sequence))
    return jax.lax.with_sharding_constraint(x, place)


def enabled(function: Callable, place: NamedSharding, sequence: str | None = None) -> Callable:
    """`function`, traced with every border's arrays laid out as `place`, which splits their leading axis, and their
    tokens over the mesh axis `sequence`."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with _kept((place, sequence)):
            return function(*args)

    return traced


def _parts(place: NamedSharding) -> int:
    axes = place.spec[0]
    return math.prod(place.mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes))
