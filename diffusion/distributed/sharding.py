"""Shardings of arrays over the mesh: batches by example, the train state by ordered rules on its paths."""

import collections
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion.core.trees import matcher, path_name
from diffusion.core.types import InputError
from diffusion.distributed.mesh import REST

# A regular expression on the path, and one mesh axis, tuple of axes or None per dimension. None in place of the axes
# replicates the array.
Rule = tuple[str, tuple[str | tuple[str, ...] | None, ...] | None]
# Elements below which an array is replicated: 1 MiB in float32. Gathering a small array costs more than storing it.
FSDP_MIN_SIZE = 2**18

logger = logging.getLogger(__name__)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that keeps the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its leading axis over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(("data", *_fsdp_axes(mesh))))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
    return mesh.shape["data"] * _shards(_fsdp_axes(mesh), mesh)


def of_state(state: Any, mesh: Mesh, rules: Sequence[Rule] = (), fsdp_min_size: int = FSDP_MIN_SIZE) -> Any:
    """Returns a sharding for each leaf of an abstract state.

    The first rule whose expression is found in the path of a leaf, such as `ema/0.999/net/conv_in/kernel`, says which
    mesh axes shard which dimension. The paths of optimizer moments and EMA copies end with the path of their
    parameter, so one rule covers all three.

    `fsdp` needs no rule. It shards the largest dimension that it divides and that no rule has sharded, or two such
    dimensions if the mesh has `fsdp_rest`. Arrays of fewer than `fsdp_min_size` elements are replicated over it. A
    rule may name `fsdp`, which stands for both axes and applies to arrays of any size. A rule with None in place of
    the axes replicates an array.

    Args:
      state: A pytree of arrays or `jax.ShapeDtypeStruct`.
      mesh: The device mesh.
      rules: Pairs of a regular expression and mesh axes.
      fsdp_min_size: Number of elements from which an array is sharded over `fsdp` without a rule; 0 shards all.

    Raises:
      InputError: A rule is not a regular expression, or has an unknown axis, the same axis twice, more axes than the
        array has dimensions, or an axis that does not divide its dimension.
    """
    rule_of = _rule_of(rules)

    def place(path, leaf) -> NamedSharding:
        name, index = path_name(path), rule_of(path, leaf)
        spec = () if index is None else rules[index][1]
        if spec is None:
            return replicated(mesh)
        split = [_axes(axes, mesh) for axes in spec]
        _check(split, leaf.shape, mesh, f"sharding.rules[{index}]", name)
        split += [()] * (leaf.ndim - len(split))
        if math.prod(leaf.shape) >= fsdp_min_size and not any("fsdp" in axes for axes in split):
            for dimension, axes in _fsdp(leaf.shape, split, mesh).items():
                split[dimension] = axes
        return NamedSharding(mesh, _spec(split))

    return jax.tree.map_with_path(place, state)


def warn_of_unused(rules: Sequence[Rule], *states: Any) -> None:
    """Logs each rule that decides the sharding of no leaf of the states, because of a spelling error for example."""
    rule_of = _rule_of(rules)
    used = {rule_of(path, leaf) for state in states for path, leaf in jax.tree.leaves_with_path(state)}
    for index, (pattern, _) in enumerate(rules):
        if index not in used:
            logger.warning("sharding.rules[%d] (%r) decides the sharding of no array", index, pattern)


def replicated_arrays(state: Any, fsdp_min_size: int = FSDP_MIN_SIZE) -> dict[str, int]:
    """Returns the bytes of each large array that several devices replicate, by name.

    Args:
      state: A pytree of arrays or `jax.ShapeDtypeStruct` with shardings.
      fsdp_min_size: As in `of_state`. Arrays with fewer elements, or with fewer than `FSDP_MIN_SIZE`, are left out:
        they are replicated on purpose, or their memory does not matter.
    """
    return {path_name(path): leaf.size * leaf.dtype.itemsize for path, leaf in jax.tree.leaves_with_path(state)
            if leaf.sharding.is_fully_replicated and leaf.sharding.num_devices > 1
            and leaf.size >= max(fsdp_min_size, FSDP_MIN_SIZE)}  # fmt: skip


def part_of_process(sharding: NamedSharding, batch_size: int, process: int) -> tuple[int, int]:
    """Returns which part of every batch a process reads, and the number of parts.

    Processes whose devices hold the same rows, because they share a model, read the same part.
    """
    rows = collections.defaultdict(set)
    for device, index in sharding.devices_indices_map((batch_size,)).items():
        rows[device.process_index].add(index[0].start or 0)
    parts = sorted({tuple(sorted(starts)) for starts in rows.values()})
    return parts.index(tuple(sorted(rows[process]))), len(parts)


def to_global(batch: Mapping, sharding: NamedSharding) -> Any:
    """Makes global arrays `[B, ...]` from this process's part of a batch, numpy arrays `[b, ...]`."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def spread(tree: Any, sharding: NamedSharding) -> Any:
    """Shards arrays and keys `[B, ...]` that every process holds whole."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def place(x):
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)))
        return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)

    return jax.tree.map(place, tree)


def _rule_of(rules: Sequence[Rule]) -> Callable[[Any, Any], int | None]:
    """Returns a function of a path and its leaf that returns the number of the first rule that applies, or None."""
    matchers = [matcher([pattern], f"sharding.rules[{index}]") for index, (pattern, _) in enumerate(rules)]

    def rule_of(path: Any, leaf: Any) -> int | None:
        name = path_name(path)
        return next((index for index, matches in enumerate(matchers) if leaf.ndim and matches(name)), None)

    return rule_of


def _fsdp_axes(mesh: Mesh) -> tuple[str, ...]:
    return ("fsdp", REST) if REST in mesh.shape else ("fsdp",)


def _shards(axes: Sequence[str], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _axes(given: str | Sequence[str] | None, mesh: Mesh) -> tuple[str, ...]:
    """Returns the mesh axes of one dimension in a rule, with `fsdp` expanded."""
    given = () if given is None else (given,) if isinstance(given, str) else given
    return tuple(part for axis in given for part in (_fsdp_axes(mesh) if axis == "fsdp" else (axis,)))


def _spec(split: Sequence[tuple[str, ...]]) -> PartitionSpec:
    last = max((dimension for dimension, axes in enumerate(split) if axes), default=-1)
    return PartitionSpec(*((axes[0] if len(axes) == 1 else axes) if axes else None for axes in split[: last + 1]))


def _fsdp(shape: tuple[int, ...], split: Sequence[tuple[str, ...]], mesh: Mesh) -> dict[int, tuple[str, ...]]:
    """Chooses which unsharded dimensions to shard over fsdp: most shards first, then the largest dimension."""
    axes = _fsdp_axes(mesh)
    free = [dimension for dimension in range(len(shape)) if _shards(split[dimension], mesh) == 1]
    ways = [{dimension: axes} for dimension in free]
    if len(axes) > 1:
        ways += [dict(zip(pair, ((axis,) for axis in axes), strict=True)) for pair in itertools.permutations(free, 2)]
        ways += [{dimension: (axis,)} for dimension in free for axis in axes]
    dividing = [way for way in ways if all(shape[d] % _shards(axes, mesh) == 0 for d, axes in way.items())]

    def rank(way: dict[int, tuple[str, ...]]) -> tuple:
        shards = math.prod(_shards(axes, mesh) for axes in way.values())
        return shards, -len(way), *(shape[dimension] for dimension in way)

    return max(dividing, key=rank) if dividing and mesh.shape["fsdp"] > 1 else {}


def _check(split: Sequence[tuple[str, ...]], shape: tuple[int, ...], mesh: Mesh, field: str, name: str) -> None:
    if len(split) > len(shape):
        raise InputError(field, f"has {len(split)} axes, but {name} has {len(shape)} dimensions")
    used = [axis for axes in split for axis in axes]
    for axis in used:
        if axis not in mesh.shape:
            raise InputError(field, f"there is no mesh axis {axis!r}; choose one of: {', '.join(mesh.shape)}")
        if used.count(axis) > 1:
            raise InputError(field, f"uses mesh axis {axis!r} for two dimensions; an axis may shard only one")
    for size, axes in zip(shape, split, strict=False):
        if size % _shards(axes, mesh):
            shards = _shards(axes, mesh)
            raise InputError(field, f"shards a dimension of size {size} of {name} {shards} ways; use a divisor of it")
