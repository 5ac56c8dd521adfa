"""Where arrays lie on the mesh: batches by example, the train state by ordered rules on its paths."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffusion.types import InputError

BATCH_AXES = ("data", "fsdp")

Rule = tuple[str, tuple]  # a regular expression on the path, and the mesh axis (or None) of each dimension


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The leading axis over data x fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def of_state(state: Any, mesh: Mesh, rules: Sequence[Rule] = ()) -> Any:
    """A sharding for each leaf of an abstract state.

    The first rule whose expression is found in the leaf's path, such as `ema/0.999/net/conv_in/kernel`, decides; paths
    of optimizer moments and EMA copies end as those of their parameters do, so one rule holds for all three. A leaf
    that no rule matches has its largest dimension that divides split over `fsdp`.

    Raises:
      InputError: a rule with an unknown axis, more axes than dimensions, or one that does not divide.
    """
    compiled = [(re.compile(pattern), spec, index) for index, (pattern, spec) in enumerate(rules)]

    def place(path, leaf) -> NamedSharding:
        name = path_name(path)
        for pattern, spec, index in compiled:
            if pattern.search(name) and leaf.ndim:
                _check(spec, leaf.shape, mesh, f"sharding.rules[{index}]", name)
                return NamedSharding(mesh, PartitionSpec(*spec))
        return NamedSharding(mesh, _fsdp(leaf.shape, mesh.shape["fsdp"]))

    return jax.tree.map_with_path(place, state)


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


def _fsdp(shape: tuple[int, ...], shards: int) -> PartitionSpec:
    dividing = [axis for axis, size in enumerate(shape) if shards > 1 and size % shards == 0]
    if not dividing:
        return PartitionSpec()
    largest = max(dividing, key=lambda axis: shape[axis])
    return PartitionSpec(*(None,) * largest, "fsdp")


def _check(spec: tuple, shape: tuple[int, ...], mesh: Mesh, field: str, name: str) -> None:
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
