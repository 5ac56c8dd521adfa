"""Where arrays lie on the mesh: batches by example, the train state by ordered rules on its paths."""

import collections
import itertools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion.core.types import InputError
from diffusion.distributed.mesh import REST

# A regular expression on the path, and the mesh axis or axes (or None) of each dimension; None for a leaf left whole.
Rule = tuple[str, tuple[str | tuple[str, ...] | None, ...] | None]


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The leading axis over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", *_fsdp_axes(mesh))))


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return mesh.shape["data"] * _parts(_fsdp_axes(mesh), mesh)


def of_state(state: Any, mesh: Mesh, rules: Sequence[Rule] = ()) -> Any:
    """A sharding for each leaf of an abstract state.

    The first rule whose expression is found in the leaf's path, such as `ema/0.999/net/conv_in/kernel`, says which mesh
    axes split which dimension; paths of optimizer moments and EMA copies end as those of their parameters do, so one
    rule holds for all three. `fsdp` needs no rule: it splits the largest dimension that divides and that no rule has
    split, or two of them where the mesh has `fsdp_rest`, one over each. A rule may name it all the same, for both. A
    rule of None in the place of axes leaves a leaf whole.

    Raises:
      InputError: a rule that is no regular expression, or with an unknown axis, one axis twice, more axes than
        dimensions, or one that does not divide.
    """
    compiled = [(_expression(pattern, index), spec, index) for index, (pattern, spec) in enumerate(rules)]
    unused = {index: pattern for index, (pattern, _) in enumerate(rules)}

    def place(path, leaf) -> NamedSharding:
        name = path_name(path)
        found = ((spec, index) for pattern, spec, index in compiled if leaf.ndim and pattern.search(name))
        spec, index = next(found, ((), None))
        unused.pop(index, None)
        if spec is None:
            return replicated(mesh)
        split = [_axes(axes, mesh) for axes in spec]
        _check(split, leaf.shape, mesh, f"sharding.rules[{index}]", name)
        split += [()] * (leaf.ndim - len(split))
        if not any("fsdp" in axes for axes in split):
            for dimension, axes in _fsdp(leaf.shape, split, mesh).items():
                split[dimension] = axes
        return NamedSharding(mesh, _spec(split))

    placed = jax.tree.map_with_path(place, state)
    for index, pattern in unused.items():
        print(f"warning: sharding.rules[{index}], {pattern!r}, decides for no array", file=sys.stderr)
    return placed


def replicated_arrays(state: Any, least: int = 2**20) -> dict[str, int]:
    """Bytes of the arrays, from `least` on, that every device of several has whole, by name.

    Args:
      state: of arrays or `jax.ShapeDtypeStruct`, with their shardings.
    """
    size = {path_name(path): leaf.size * leaf.dtype.itemsize for path, leaf in jax.tree.leaves_with_path(state)
            if leaf.sharding.is_fully_replicated and leaf.sharding.num_devices > 1}  # fmt: skip
    return {name: bytes for name, bytes in size.items() if bytes >= least}


def part_of_process(sharding: NamedSharding, batch_size: int, process: int) -> tuple[int, int]:
    """Which part of every batch a process reads, and how many parts there are. Processes whose devices have the same
    rows, because they share a model, read the same part."""
    rows = collections.defaultdict(set)
    for device, index in sharding.devices_indices_map((batch_size,)).items():
        rows[device.process_index].add(index[0].start or 0)
    parts = sorted({tuple(sorted(starts)) for starts in rows.values()})
    return parts.index(tuple(sorted(rows[process]))), len(parts)


def to_global(batch: Mapping, sharding: NamedSharding) -> Any:
    """This process's part of a batch, numpy `[b, ...]`, into global arrays `[B, ...]`."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def spread(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays and keys `[B, ...]` that every process has whole, each laid out."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)))
        return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)

    return jax.tree.map(place, tree)


def path_name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _expression(pattern: str, index: int) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"sharding.rules[{index}]", f"{pattern!r} is no regular expression: {error}") from None


def _fsdp_axes(mesh: Mesh) -> tuple[str, ...]:
    return ("fsdp", REST) if REST in mesh.shape else ("fsdp",)


def _parts(axes: Sequence[str], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _axes(given: str | Sequence[str] | None, mesh: Mesh) -> tuple[str, ...]:
    """A dimension's axes in a rule, as the mesh has them."""
    given = () if given is None else (given,) if isinstance(given, str) else given
    return tuple(part for axis in given for part in (_fsdp_axes(mesh) if axis == "fsdp" else (axis,)))


def _spec(split: Sequence[tuple[str, ...]]) -> PartitionSpec:
    last = max((dimension for dimension, axes in enumerate(split) if axes), default=-1)
    return PartitionSpec(*((axes[0] if len(axes) == 1 else axes) if axes else None for axes in split[: last + 1]))


def _fsdp(shape: tuple[int, ...], split: Sequence[tuple[str, ...]], mesh: Mesh) -> dict[int, tuple[str, ...]]:
    """The split of the dimensions that are whole into the most parts, of the largest."""
    axes = _fsdp_axes(mesh)
    free = [dimension for dimension in range(len(shape)) if _parts(split[dimension], mesh) == 1]
    ways = [{dimension: axes} for dimension in free]
    if len(axes) > 1:
        ways += [dict(zip(pair, ((axis,) for axis in axes), strict=True)) for pair in itertools.permutations(free, 2)]
        ways += [{dimension: (axis,)} for dimension in free for axis in axes]
    dividing = [way for way in ways if all(shape[d] % _parts(axes, mesh) == 0 for d, axes in way.items())]

    def rank(way: dict[int, tuple[str, ...]]) -> tuple:
        parts = math.prod(_parts(axes, mesh) for axes in way.values())
        return parts, -len(way), *(shape[dimension] for dimension in way)

    return max(dividing, key=rank) if dividing and mesh.shape["fsdp"] > 1 else {}


def _check(split: Sequence[tuple[str, ...]], shape: tuple[int, ...], mesh: Mesh, field: str, name: str) -> None:
    if len(split) > len(shape):
        raise InputError(field, f"has {len(split)} axes, but {name} has {len(shape)} dimensions")
    used = [axis for axes in split for axis in axes]
    for axis in used:
        if axis not in mesh.shape:
            raise InputError(field, f"no mesh axis {axis!r}; one of: {', '.join(mesh.shape)}")
        if used.count(axis) > 1:
            raise InputError(field, f"splits two dimensions over {axis!r}; an axis may split one")
    for size, axes in zip(shape, split, strict=False):
        if size % _parts(axes, mesh):
            raise InputError(field, f"splits a dimension of {size} of {name} into {_parts(axes, mesh)}, which does not "
                             "divide it")  # fmt: skip
