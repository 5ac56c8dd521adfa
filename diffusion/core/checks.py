"""Checks of options that users set. Each raises an InputError that names the option."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion.core.types import ConditionSpec, InputError

LARGEST = 2**16  # limit for sizes of a network: a larger one is a typing error, and building it would fill the memory
MOST = {
    "num_res_blocks": 1000,
    "layers_per_block": 1000,
}  # smaller limits for the numbers of blocks, which are built one by one


def images(network: str, shape: tuple[int, ...]) -> None:
    """Checks that examples are images `[H, W, C]`."""
    if len(shape) != 3:
        problem = f"{network} requires images (H, W, C), got {shape}; choose another network or other data"
        raise InputError("shape", problem)


def patches(shape: tuple[int, ...], patch_size: int) -> None:
    """Checks that square patches divide images."""
    height, width, _ = shape
    if height % patch_size or width % patch_size:
        raise InputError("patch_size", f"must divide the {height} x {width} pixels of an image, got {patch_size}")


def condition_kinds(
    network: str, conditions: Mapping[str, ConditionSpec], kinds: Collection[str], shape: tuple[int, ...]
) -> None:
    """Checks that a network for examples of this shape can be conditioned on the conditions of the data."""
    for name, condition in conditions.items():
        if condition.kind not in kinds:
            problem = f"{network} cannot be conditioned on {name!r} ({condition.kind}); use unet, dit or uvit"
            raise InputError("name", problem)
        if condition.kind == "image" and condition.shape[:2] != shape[:2]:
            height, width = condition.shape[:2]
            problem = f"{network} requires {name!r} to have the height and width of x, {shape[:2]}"
            raise InputError("name", f"{problem}, got {height} x {width}")


def labels(values: Any, num_classes: int, field: str) -> None:
    """Checks that labels, a sequence or an array, are one or more integers from 0 to num_classes - 1."""
    values = np.asarray(values)
    if values.dtype.kind not in "iu" or values.ndim != 1 or not values.size:
        raise InputError(field, f"must be one or more integers, got {_shown(values)}")
    wrong = values[(values < 0) | (values >= num_classes)]
    if wrong.size:
        raise InputError(field, f"must be from 0 to {num_classes - 1}, got {wrong[0]}")


def _shown(values: np.ndarray) -> str:
    return np.array2string(values, threshold=5, edgeitems=2, separator=", ").replace("\n", "")[:60]


def positive(**numbers: float | None) -> None:
    """Checks that each number is positive; None, an option that is not set, passes."""
    for name, value in numbers.items():
        if value is not None and not value > 0:
            raise InputError(name, f"must be positive, got {value}")


def at_least(minimum: float, **numbers: float | None) -> None:
    """Checks that each number is at least `minimum`; None passes."""
    for name, value in numbers.items():
        if value is not None and not value >= minimum:
            raise InputError(name, f"must be at least {minimum}, got {value}")


def at_most(most: int, number: int, field: str) -> int:
    """Returns `number` after checking that it is at most `most`.

    The limit is generous: a number beyond it is a typing error that would exhaust the memory.

    Raises:
      InputError: The number is larger; the error names `field`.
    """
    if number > most:
        raise InputError(field, f"must be at most {most:,}, got {number}")
    return number


def rate(**rates: float) -> None:
    """Checks that each rate is in [0, 1)."""
    for name, value in rates.items():
        if not 0 <= value < 1:
            raise InputError(name, f"must be in [0, 1), got {value}")


def network_size(**numbers: float | None) -> None:
    """Checks that each size of a network is positive and not so large that building the network fills the memory."""
    positive(**numbers)
    for name, value in numbers.items():
        at_most(MOST.get(name, LARGEST), value or 0, name)


def inner_width(width: float) -> int:
    """Returns the width of a perceptron's inner layer as an integer, after checking that it is at least 1."""
    if width < 1:
        raise InputError("mlp_ratio", f"must give the inner layer at least one unit, gives {width:g}; increase it")
    return int(width)


def levels(
    shape: tuple[int, ...],
    width: int,
    channel_mult: Sequence[float],
    attention_resolutions: Collection[int],
    head_dim: int | None,
    *,
    middle_attention: bool = True,
) -> None:
    """Checks a U-Net's levels.

    The images must be divisible by 2 once per level after the first, each attention resolution must be that of the
    shorter side at a level, and the attention heads must divide the channels that they attend to.
    """
    channels = [round(width * multiplier) for multiplier in channel_mult]
    if not channels or min(channels) < 1:
        raise InputError("channel_mult", f"must be one or more positive numbers, got {channel_mult}")
    at_most(LARGEST, max(channels), "channel_mult")
    halvings, size = len(channel_mult) - 1, min(shape[:2])
    for pixels in shape[:2]:
        if pixels % (1 << halvings):
            raise InputError("channel_mult", f"{pixels} pixels cannot be halved {halvings} times; use fewer levels")
    sizes = [size >> level for level in range(len(channel_mult))]
    for resolution in attention_resolutions:
        if resolution not in sizes:
            raise InputError("attention_resolutions", f"no level has resolution {resolution}; the levels have {sizes}")
    attended = {number for number, size in zip(channels, sizes, strict=True) if size in attention_resolutions}
    attended |= {channels[-1]} if middle_attention else set()
    for number in sorted(attended):
        if head_dim and number % head_dim:
            raise InputError("head_dim", f"must divide the {number} channels of an attention block, got {head_dim}")
