"""What the models of diffusers have in common: entries of `config.json` and checks of them."""

from collections.abc import Mapping
from typing import Any

from diffusion.core.types import NO_CONDITIONS, ArraySpec, ConditionSpec, InputError, Spec, class_labels


def data_spec(
    size: tuple[int, int], channels: int, num_classes: int, conditions: Mapping[str, ConditionSpec] = NO_CONDITIONS
) -> Spec:
    """Returns the specification of images, or of latents if there are neither 1 nor 3 channels, with classes and other
    conditions."""
    kind = "image" if channels in (1, 3) else "latent"
    return Spec(ArraySpec((*size, channels), kind), class_labels(num_classes) | dict(conditions))


def check_entries(config: Mapping[str, Any], **supported: Any) -> None:
    """Raises InputError if an entry of `config.json` has a value that this library's network does not support."""
    for name, value in supported.items():
        values = value if isinstance(value, tuple) else (value,)
        if config[name] not in values:
            expected = " or ".join(repr(value) for value in values)
            raise InputError(f"config.json.{name}", f"must be {expected} to be read, got {config[name]!r}")


def check_options(network: Mapping[str, Any], **supported: Any) -> None:
    """Raises InputError if an option of a network has a value that diffusers' model does not support."""
    for name, value in supported.items():
        if network[name] != value:
            problem = f"must be {value!r} to be written for diffusers, got {network[name]!r}"
            raise InputError(f"network.{name}", problem)


def outputs(config: Mapping[str, Any]) -> int:
    """Returns the number of output values per channel of x."""
    channels, out = config["in_channels"], config["out_channels"] or config["in_channels"]
    if out not in (channels, 2 * channels):
        raise InputError("config.json.out_channels", f"must be {channels} or {2 * channels} to be read, got {out}")
    return out // channels


def image_size(config: Mapping[str, Any], levels: int = 1) -> tuple[int, int]:
    """Returns the height and the width of the images, which are halved once per level after the first."""
    size = config["sample_size"]
    sides = (size, size) if isinstance(size, int) else tuple(size or ())
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise InputError("config.json.sample_size", f"must be the side, or the height and width, of images, got {size}")
    if any(side % (1 << levels - 1) for side in sides):
        raise InputError("config.json.sample_size", f"must be divisible by {1 << levels - 1} to be read, got {size}")
    return sides
