"""The device mesh."""

import math

import jax
from jax.sharding import AxisType, Mesh

from diffusion.types import InputError

AXES = ("data", "fsdp", "model")


def make(data: int = -1, fsdp: int = 1, model: int = 1) -> Mesh:
    """A mesh over all devices with axes `data`, `fsdp` and `model`; one size may be -1, for all that is left.

    The batch is split over data x fsdp, parameters over fsdp and, by rule, over model.
    """
    sizes = dict(zip(AXES, (data, fsdp, model), strict=True))
    devices = jax.device_count()
    for name, size in sizes.items():
        if size < 1 and size != -1:
            raise InputError(name, f"must be positive, or -1 for all devices that are left; got {size}")
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise InputError(free[1], f"only one axis may be -1, and {free[0]} is already")
    taken = math.prod(size for size in sizes.values() if size != -1)
    if devices % taken or (not free and devices != taken):
        field = next(name for name, size in sizes.items() if size not in (1, -1) or not free)
        raise InputError(field, f"the axes {sizes} do not multiply to the {devices} devices there are")
    if free:
        sizes[free[0]] = devices // taken
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))
