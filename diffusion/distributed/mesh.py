"""Builds the device mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from diffusion.core.types import InputError

AXES = ("data", "fsdp", "model")
# Widths are multiples of 128 but rarely of a larger power of two (1152 of DiT-XL is 2^7 * 9), so one dimension is
# sharded at most 128 ways. The remaining factor is a separate mesh axis, `fsdp_rest`, which shards another dimension.
MAX_SHARDS, REST = 128, "fsdp_rest"


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes `data`, `fsdp` and `model`; one size may be -1, which takes the remaining devices.

    The batch is sharded over data x fsdp, parameters over fsdp and, by rule, over model. An fsdp size above 128 is
    factored into the axes `fsdp` and `fsdp_rest`. On several slices of a pod, `data` runs over the slices first: its
    traffic, once per step, is the only one that crosses the slow network between slices.

    Args:
      data, fsdp, model: Numbers of devices along each axis.
      devices: The devices of the mesh; all by default.

    Raises:
      InputError: The product of the sizes is not the number of devices, or `data` is not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, model), strict=True))
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise InputError(name, f"must be positive, or -1 for the remaining devices; got {size}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise InputError(free[1], f"only one axis may be -1, and {free[0]} already is")
    given = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % given or (not free and len(devices) != given):
        field = next(name for name, size in sizes.items() if size not in (1, -1) or not free)
        raise InputError(field, f"the product of the axes {sizes} must be the number of devices, {len(devices)}")
    if free:
        sizes[free[0]] = len(devices) // given
    shards = max(count for count in range(1, min(sizes["fsdp"], MAX_SHARDS) + 1) if sizes["fsdp"] % count == 0)
    if shards < sizes["fsdp"]:
        rest = sizes["fsdp"] // shards
        sizes = {"data": sizes["data"], "fsdp": shards, REST: rest, "model": sizes["model"]}
    return Mesh(_arranged(tuple(sizes.values()), devices), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices in the shape of the mesh, arranged to suit the network that connects them."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise InputError("data", f"must be a multiple of the number of slices, {slices}; got {shape[0]}")
    within, between = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
