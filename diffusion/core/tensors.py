"""Correspondence between this library's arrays and the tensors of another library, in one table for both directions.

A network is a list of `Pair`s, each of one native array and the foreign tensors that it consists of.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion.core import trees
from diffusion.core.types import InputError, Params

Tensors = Mapping[str, np.ndarray]
# Names of attention layers before diffusers 0.13, and their present names.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A native array and the foreign tensors that it consists of.

    Attributes:
      native: The path of the array in the parameters, such as `down/0_0/conv1/kernel`.
      foreign: The names of the tensors.
      join: Maps the tensors, in this order, to the array.
      split: Maps the array to the tensors; the inverse of `join`.
    """

    native: str
    foreign: tuple[str, ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], Sequence[np.ndarray]]


def same(native: str, foreign: str) -> Pair:
    """Pairs an array with an identical tensor."""
    return Pair(native, (foreign,), lambda tensors: tensors[0], lambda array: [array])


def permuted(native: str, foreign: str, *axes: int) -> Pair:
    """Pairs an array with a tensor whose transpose by `axes` it is."""
    back = np.argsort(axes)
    return Pair(native, (foreign,), lambda tensors: tensors[0].transpose(axes), lambda array: [array.transpose(back)])


def linear(native: str, foreign: str) -> list[Pair]:
    """Pairs linear layers: kernels `[in, out]` and `[out, in]`, and biases."""
    return [permuted(f"{native}/kernel", f"{foreign}.weight", 1, 0), same(f"{native}/bias", f"{foreign}.bias")]


def conv(native: str, foreign: str) -> list[Pair]:
    """Pairs convolutions: kernels HWIO and OIHW, and biases."""
    return [permuted(f"{native}/kernel", f"{foreign}.weight", 2, 3, 1, 0), same(f"{native}/bias", f"{foreign}.bias")]


def pointwise(native: str, foreign: str) -> list[Pair]:
    """Pairs a native linear layer with a foreign 1x1 convolution."""
    kernel = Pair(f"{native}/kernel", (f"{foreign}.weight",), lambda tensors: tensors[0][:, :, 0, 0].T,
                  lambda array: [array.T[:, :, None, None]])  # fmt: skip
    return [kernel, same(f"{native}/bias", f"{foreign}.bias")]


def norm(native: str, foreign: str) -> list[Pair]:
    """Returns the pairs of a normalization layer: scale and bias."""
    return [same(f"{native}/scale", f"{foreign}.weight"), same(f"{native}/bias", f"{foreign}.bias")]


def fused(native: str, foreign: Sequence[str]) -> list[Pair]:
    """Pairs one native linear layer with several foreign ones of the same input, whose outputs it concatenates."""
    kernel = Pair(
        f"{native}/kernel",
        tuple(f"{name}.weight" for name in foreign),
        lambda tensors: np.concatenate([tensor.T for tensor in tensors], axis=1),
        lambda array: [part.T for part in np.split(array, len(foreign), axis=1)],
    )
    bias = Pair(
        f"{native}/bias",
        tuple(f"{name}.bias" for name in foreign),
        np.concatenate,
        lambda array: np.split(array, len(foreign)),
    )
    return [kernel, bias]


def copies(pairs: Sequence[Pair], prefixes: Sequence[str]) -> list[Pair]:
    """Pairs native arrays with foreign tensors of which there is an equal copy per prefix."""

    def copied(pair: Pair) -> Pair:
        (name,) = pair.foreign
        names = tuple(prefix + name for prefix in prefixes)
        return Pair(pair.native, names, lambda tensors: pair.join(tensors[:1]),
                    lambda array: [*pair.split(array)] * len(names))  # fmt: skip

    return [copied(pair) for pair in pairs]


def stacked(pairs: Sequence[Pair], prefixes: Sequence[str]) -> list[Pair]:
    """Pairs native arrays, stacked over the blocks along a leading axis, with foreign tensors of one block per
    prefix."""

    def over_blocks(pair: Pair) -> Pair:
        width = len(pair.foreign)

        def join(tensors: Sequence[np.ndarray]) -> np.ndarray:
            blocks = (tensors[i : i + width] for i in range(0, len(tensors), width))
            return np.stack([pair.join(block) for block in blocks])

        names = tuple(prefix + name for prefix in prefixes for name in pair.foreign)
        return Pair(pair.native, names, join, lambda array: [part for block in array for part in pair.split(block)])

    return [over_blocks(pair) for pair in pairs]


def check(pairs: Sequence[Pair], tensors: Tensors, shapes: Params) -> None:
    """Checks that foreign tensors are those of a network, without reading their numbers.

    Args:
      pairs, tensors, shapes: See `to_native`.

    Raises:
      InputError: if a tensor is missing, is not in the table, or has the wrong shape.
    """
    native = trees.by_path(shapes)
    known = {name for pair in pairs for name in pair.foreign}
    for name in sorted(tensors.keys() - known):
        raise InputError(f"tensors.{name}", f"of shape {list(tensors[name].shape)} belongs to no layer of config.json")
    for pair in pairs:
        parts = pair.split(np.broadcast_to(np.float32(0), native[pair.native].shape))
        for name, like in zip(pair.foreign, parts, strict=True):
            if name not in tensors:
                raise InputError(f"tensors.{name}", f"is missing; config.json requires it, of shape {list(like.shape)}")
            if tensors[name].shape != like.shape:
                actual, expected = list(tensors[name].shape), list(like.shape)
                raise InputError(f"tensors.{name}", f"must have shape {expected} by config.json, got {actual}")
    assert {pair.native for pair in pairs} == native.keys(), "the table does not cover the network"


def to_native(
    pairs: Sequence[Pair], tensors: Tensors, shapes: Params,
    place: Callable[[str, np.ndarray], Any] = lambda path, array: array,
) -> Params:  # fmt: skip
    """Converts foreign tensors to native parameters, one after the other.

    Args:
      pairs: The table of the network.
      tensors: The foreign tensors by name.
      shapes: The native parameters, possibly abstract, which determine the shapes that the tensors must have.
      place: Called with the path of each parameter and its array; what it returns becomes the parameter. With tensors
        that are views of a file, only one parameter at a time is in the memory of the host.

    Raises:
      InputError: See `check`.
    """
    check(pairs, tensors, shapes)
    return trees.nest({pair.native: place(pair.native, pair.join([tensors[name] for name in pair.foreign]))
                       for pair in pairs})  # fmt: skip


def to_foreign(pairs: Sequence[Pair], params: Params) -> dict[str, np.ndarray]:
    """Converts native parameters to foreign tensors."""
    flat = trees.by_path(params)
    assert flat.keys() == {pair.native for pair in pairs}, "the table does not cover the network"
    return {
        name: tensor
        for pair in pairs
        for name, tensor in zip(pair.foreign, pair.split(np.asarray(flat[pair.native])), strict=True)
    }


def current_name(name: str) -> str:
    """Returns the present name of a tensor of diffusers that may have a name from before diffusers 0.13."""
    head, _, tail = name.rpartition(".")
    stem, _, last = head.rpartition(".")
    return f"{stem}.{_OLD_NAMES[last]}.{tail}" if last in _OLD_NAMES and ".attentions." in name else name
