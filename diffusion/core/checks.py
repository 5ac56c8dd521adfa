"""What several networks refuse, in one line that names the option. Each raises InputError."""

from collections.abc import Collection, Sequence

from diffusion.core.types import InputError

LARGEST = 2**16  # of a network's numbers: beyond it lies no network, and building one would fill the memory
MOST = {"num_res_blocks": 1000}  # which are built one by one


def square_images(network: str, shape: tuple[int, ...]) -> None:
    if len(shape) != 3 or shape[0] != shape[1]:
        problem = f"{network} takes square images (H, W, C), got {shape}; choose another network or data"
        raise InputError("shape", problem)


def positive(**numbers: float | None) -> None:
    """Nor is any absurdly large; None is an option that is not set."""
    for name, value in numbers.items():
        if value is not None and value <= 0:
            raise InputError(name, f"must be positive, got {value}")
        at_most(MOST.get(name, LARGEST), value or 0, name)


def inner_width(width: float) -> int:
    """Of a perceptron's inner layer, as a whole number."""
    if width < 1:
        raise InputError("mlp_ratio", f"leaves no unit for the inner layer, {width:g}; use a larger one")
    return int(width)


def rate(**rates: float) -> None:
    for name, value in rates.items():
        if not 0 <= value < 1:
            raise InputError(name, f"must be in [0, 1), got {value}")


def levels(
    size: int, width: int, channel_mult: Sequence[int], attention_resolutions: Collection[int], head_dim: int | None, *,
    middle_attention: bool = True,
) -> None:  # fmt: skip
    """Of a U-Net: images that cannot be halved so often, attention where there is no level, heads that do not fit."""
    if not channel_mult or min(channel_mult) < 1:
        raise InputError("channel_mult", f"must be one or more positive numbers, got {channel_mult}")
    at_most(LARGEST, width * max(channel_mult), "channel_mult")
    halvings = len(channel_mult) - 1
    if size % (1 << halvings):
        raise InputError("channel_mult", f"{size} pixels cannot be halved {halvings} times; use fewer levels")
    sizes = [size >> level for level in range(len(channel_mult))]
    for resolution in attention_resolutions:
        if resolution not in sizes:
            raise InputError("attention_resolutions", f"no level has resolution {resolution}; the levels have {sizes}")
    attended = {m for m, size in zip(channel_mult, sizes, strict=True) if size in attention_resolutions}
    attended |= {channel_mult[-1]} if middle_attention else set()
    for channels in (width * m for m in sorted(attended)):
        if head_dim and channels % head_dim:
            raise InputError("head_dim", f"{head_dim} does not divide the {channels} channels that attend")


def at_most(most: int, number: int, field: str) -> int:
    """The number. Raises InputError naming `field` if it is larger: what is a slip, and would fill the memory."""
    if number > most:
        raise InputError(field, f"must be at most {most:,}, got {number}")
    return number
