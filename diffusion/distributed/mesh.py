"""The device mesh."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from diffusion.core.types import InputError

AXES = ("data", "fsdp", "model")
# The most parts that one dimension is split into for `fsdp`: widths are multiples of 128 and rarely of more (1152 of
# DiT-XL is 2^7 * 9). What is beyond is a mesh axis of its own, `fsdp_rest`, that splits another dimension.
MOST_PARTS, REST = 128, "fsdp_rest"


def make_mesh(data: int = -1, fsdp: int = 1, model: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes `data`, `fsdp` and `model`; one size may be -1, for all that is left.

    The batch is split over data x fsdp, parameters over fsdp and, by rule, over model. Of an fsdp of more than 128
    parts a factor is the axis `fsdp_rest`. Where the devices are several slices of a pod, `data` runs over the slices
    first: what it sends, once a step, takes the slow way between them.

    Args:
      devices: to make it of; all by default.

    Raises:
      InputError: the sizes do not multiply to the devices, or `data` not to the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    sizes = dict(zip(AXES, (data, fsdp, model), strict=True))
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise InputError(name, f"must be positive, or -1 for all devices that are left; got {size}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise InputError(free[1], f"only one axis may be -1, and {free[0]} is already")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % taken or (not free and len(devices) != taken):
        field = next(name for name, size in sizes.items() if size not in (1, -1) or not free)
        raise InputError(field, f"the axes {sizes} do not multiply to the {len(devices)} devices there are")
    if free:
        sizes[free[0]] = len(devices) // taken
    parts = max(part for part in range(1, min(sizes["fsdp"], MOST_PARTS) + 1) if sizes["fsdp"] % part == 0)
    if parts < sizes["fsdp"]:
        rest = sizes["fsdp"] // parts
        sizes = {"data": sizes["data"], "fsdp": parts, REST: rest, "model": sizes["model"]}
    return Mesh(_arranged(tuple(sizes.values()), devices), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _arranged(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise InputError("data", f"must be a multiple of the {slices} slices there are, got {shape[0]}")
    within, between = (shape[0] // slices, *shape[1:]), (slices, *(1 for _ in shape[1:]))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)
