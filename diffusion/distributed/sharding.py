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

from diffusion.distributed.mesh import REST
from diffusion.types import InputError

Rule = tuple[str, tuple]  # a regular expression on the path, and the mesh axis (or None) of each dimension


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

    The first rule whose expression is found in the leaf's path, such as `ema/0.999/net/conv_in/kernel`, decides; paths
    of optimizer moments and EMA copies end as those of their parameters do, so one rule holds for all three. A leaf
    that no rule matches has its largest dimension that divides split over `fsdp`; if none does and the mesh has
    `fsdp_rest`, two dimensions are split, one over each. `fsdp` in a rule stands for both.

    Raises:
      InputError: a rule with an unknown axis, more axes than dimensions, or one that does not divide.
    """
    compiled = [(re.compile(pattern), spec, index) for index, (pattern, spec) in enumerate(rules)]
    unused = {index: pattern for index, (pattern, _) in enumerate(rules)}

    def place(path, leaf) -> NamedSharding:
        name = path_name(path)
        for pattern, spec, index in compiled:
            if pattern.search(name) and leaf.ndim:
                unused.pop(index, None)
                whole = tuple(_whole_fsdp(axes, mesh) for axes in spec)
                _check(whole, leaf.shape, mesh, f"sharding.rules[{index}]", name)
                return NamedSharding(mesh, PartitionSpec(*whole))
        return NamedSharding(mesh, _fsdp(leaf.shape, mesh))

    placed = jax.tree.map_with_path(place, state)
    for index, pattern in unused.items():
        print(f"warning: sharding.rules[{index}], {pattern!r}, is the first to match no array", file=sys.stderr)
    return placed


def replicated_arrays(state: Any, shardings: Any, least: int = 2**20) -> dict[str, int]:
    """Bytes of the arrays of an abstract state, from `least` on, that every device of several has whole, by name."""
    pairs = zip(jax.tree.leaves_with_path(state), jax.tree.leaves(shardings), strict=True)
    size = {path_name(path): (math.prod(leaf.shape) * leaf.dtype.itemsize, place) for (path, leaf), place in pairs}
    return {
        name: bytes
        for name, (bytes, place) in size.items()
        if bytes >= least and place.is_fully_replicated and place.num_devices > 1
    }


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


def _fsdp_axes(mesh: Mesh) -> tuple[str, ...]:
    return ("fsdp", REST) if REST in mesh.shape else ("fsdp",)


def _parts(axes: Sequence[str], mesh: Mesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _whole_fsdp(axes: str | Sequence[str] | None, mesh: Mesh) -> str | tuple[str, ...] | None:
    """A dimension's axes in a rule, as the mesh has them."""
    if axes is None or len(_fsdp_axes(mesh)) == 1:
        return axes
    axes = (axes,) if isinstance(axes, str) else tuple(axes)
    return tuple(part for axis in axes for part in (_fsdp_axes(mesh) if axis == "fsdp" else (axis,)))


def _fsdp(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The split into the most parts, of the largest dimensions."""
    axes = _fsdp_axes(mesh)
    ways = [{dimension: axes} for dimension in range(len(shape))]
    if len(axes) > 1:
        ways += [dict(zip(pair, ((axis,) for axis in axes), strict=True))
                 for pair in itertools.permutations(range(len(shape)), 2)]  # fmt: skip
        ways += [{dimension: (axis,)} for dimension in range(len(shape)) for axis in axes]
    dividing = [way for way in ways if all(shape[d] % _parts(axes, mesh) == 0 for d, axes in way.items())]
    if mesh.shape["fsdp"] == 1 or not dividing:
        return PartitionSpec()

    def rank(way: dict[int, tuple[str, ...]]) -> tuple:
        parts = math.prod(_parts(axes, mesh) for axes in way.values())
        return parts, -len(way), *(shape[dimension] for dimension in way)

    best = max(dividing, key=rank)
    split = [best.get(dimension) for dimension in range(max(best) + 1)]
    return PartitionSpec(*(axes[0] if axes and len(axes) == 1 else axes for axes in split))


def _check(spec: tuple, shape: tuple[int, ...], mesh: Mesh, field: str, name: str) -> None:
    used = [axis for axes in spec if axes is not None for axis in ((axes,) if isinstance(axes, str) else axes)]
    twice = next((axis for axis in used if used.count(axis) > 1), None)
    if twice:
        raise InputError(field, f"splits two dimensions over {twice!r}; an axis may split one")
    if len(spec) > len(shape):
        raise InputError(field, f"has {len(spec)} axes, but {name} has {len(shape)} dimensions")
    for size, axes in zip(shape, spec, strict=False):
        axes = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        for axis in axes:
            if axis not in mesh.shape:
                raise InputError(field, f"no mesh axis {axis!r}; one of: {', '.join(mesh.shape)}")
        parts = int(np.prod([mesh.shape[axis] for axis in axes]))
        if size % parts:
            raise InputError(field, f"splits a dimension of {size} of {name} into {parts}, which does not divide it")
