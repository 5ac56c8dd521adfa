"""How tensors of ours and of another library's are the same numbers: one table for both directions.

A network is a list of `Pair`s, each one of our arrays and the other library's tensors that it is made of.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusion.core.types import InputError, Params

Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Pair:
    """Attributes:
    ours: the path of an array of ours, as in `down/0_0/conv1/kernel`.
    theirs: the names of the tensors that it is made of.
    join: from their tensors, in this order, to ours.
    split: from ours to their tensors; `split(join(x)) == x`, and back.
    """

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    split: Callable[[np.ndarray], Sequence[np.ndarray]]


def same(ours: str, theirs: str) -> Pair:
    return Pair(ours, (theirs,), lambda tensors: tensors[0], lambda array: [array])


def permuted(ours: str, theirs: str, *axes: int) -> Pair:
    """Ours has their axes in this order."""
    back = np.argsort(axes)
    return Pair(ours, (theirs,), lambda tensors: tensors[0].transpose(axes), lambda array: [array.transpose(back)])


def linear(ours: str, theirs: str) -> list[Pair]:
    """`[in, out]` from `[out, in]`, and the bias."""
    return [permuted(f"{ours}/kernel", f"{theirs}.weight", 1, 0), same(f"{ours}/bias", f"{theirs}.bias")]


def conv(ours: str, theirs: str) -> list[Pair]:
    """HWIO from OIHW, and the bias."""
    return [permuted(f"{ours}/kernel", f"{theirs}.weight", 2, 3, 1, 0), same(f"{ours}/bias", f"{theirs}.bias")]


def pointwise(ours: str, theirs: str) -> list[Pair]:
    """A linear layer from a 1x1 convolution."""
    kernel = Pair(f"{ours}/kernel", (f"{theirs}.weight",), lambda tensors: tensors[0][:, :, 0, 0].T,
                  lambda array: [array.T[:, :, None, None]])  # fmt: skip
    return [kernel, same(f"{ours}/bias", f"{theirs}.bias")]


def norm(ours: str, theirs: str) -> list[Pair]:
    return [same(f"{ours}/scale", f"{theirs}.weight"), same(f"{ours}/bias", f"{theirs}.bias")]


def fused(ours: str, theirs: Sequence[str]) -> list[Pair]:
    """One linear layer from several that are asked the same, their outputs side by side."""
    kernel = Pair(
        f"{ours}/kernel",
        tuple(f"{name}.weight" for name in theirs),
        lambda tensors: np.concatenate([tensor.T for tensor in tensors], axis=1),
        lambda array: [part.T for part in np.split(array, len(theirs), axis=1)],
    )
    bias = Pair(
        f"{ours}/bias",
        tuple(f"{name}.bias" for name in theirs),
        np.concatenate,
        lambda array: np.split(array, len(theirs)),
    )
    return [kernel, bias]


def copies(pairs: Sequence[Pair], prefixes: Sequence[str]) -> list[Pair]:
    """What ours has once, and theirs under each prefix: the copies must be equal."""

    def copied(pair: Pair) -> Pair:
        (name,) = pair.theirs
        names = tuple(prefix + name for prefix in prefixes)

        def join(tensors: Sequence[np.ndarray]) -> np.ndarray:
            for other, tensor in zip(names, tensors, strict=True):
                if not np.array_equal(tensor, tensors[0]):
                    raise InputError(f"tensors.{other}", f"differs from {names[0]}; ours has one for all blocks")
            return pair.join(tensors[:1])

        return Pair(pair.ours, names, join, lambda array: [*pair.split(array)] * len(names))

    return [copied(pair) for pair in pairs]


def stacked(pairs: Sequence[Pair], prefixes: Sequence[str]) -> list[Pair]:
    """Blocks that are stacked in ours along a leading axis, and stand under one prefix each in theirs."""

    def over_blocks(pair: Pair) -> Pair:
        width = len(pair.theirs)

        def join(tensors: Sequence[np.ndarray]) -> np.ndarray:
            blocks = (tensors[i : i + width] for i in range(0, len(tensors), width))
            return np.stack([pair.join(block) for block in blocks])

        names = tuple(prefix + name for prefix in prefixes for name in pair.theirs)
        return Pair(pair.ours, names, join, lambda array: [part for block in array for part in pair.split(block)])

    return [over_blocks(pair) for pair in pairs]


def to_ours(pairs: Sequence[Pair], tensors: Tensors, shapes: Params) -> Params:
    """Our parameters from their tensors.

    Args:
      shapes: our parameters, abstract, which say what shape each of their tensors must have.

    Raises:
      InputError: a tensor is missing, is not in the table, or has another shape.
    """
    ours = _flat(shapes)
    known = {name for pair in pairs for name in pair.theirs}
    for name in sorted(tensors.keys() - known):
        raise InputError(f"tensors.{name}", f"{list(tensors[name].shape)} belongs to no layer of its config.json")
    flat = {}
    for pair in pairs:
        parts = pair.split(np.broadcast_to(np.float32(0), ours[pair.ours].shape))
        for name, like in zip(pair.theirs, parts, strict=True):
            if name not in tensors:
                raise InputError(f"tensors.{name}", f"{list(like.shape)} is missing")
            if tensors[name].shape != like.shape:
                there, wanted = list(tensors[name].shape), list(like.shape)
                raise InputError(f"tensors.{name}", f"is {there}; by config.json it must be {wanted}")
        flat[pair.ours] = pair.join([tensors[name] for name in pair.theirs])
    assert flat.keys() == ours.keys(), "the table does not cover the network"
    return _nested(flat)


def to_theirs(pairs: Sequence[Pair], params: Params) -> dict[str, np.ndarray]:
    """Their tensors from our parameters."""
    flat = _flat(params)
    assert flat.keys() == {pair.ours for pair in pairs}, "the table does not cover the network"
    return {
        name: tensor
        for pair in pairs
        for name, tensor in zip(pair.theirs, pair.split(np.asarray(flat[pair.ours])), strict=True)
    }


def lengths(params: Params, last: str) -> set[int]:
    """Of our vectors whose path ends so."""
    return {array.size for path, array in _flat(params).items() if path.rpartition("/")[2] == last}


def _flat(params: Params) -> dict[str, Any]:
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(params)}


def _nested(flat: Mapping[str, np.ndarray]) -> Params:
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        place = nested
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return nested
