"""Coloured shapes on black: their masks, their colours, and the search for the mask and colour nearest to given pixels.

Random choices depend on integers alone and are the same on every machine and with every version of NumPy: they are
digits of a hash, and every pixel is a multiple of 1/64, which float32 represents exactly.
"""

import hashlib
import math
import operator
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from diffusion.core.types import InputError, Spec

# Any two colours, and any colour and black, are at least 1.7 apart in [-1, 1].
COLOURS = {
    "red": (1.0, 0.0, 0.0),
    "green": (0.0, 1.0, 0.0),
    "blue": (0.0, 0.0, 1.0),
    "yellow": (1.0, 1.0, 0.0),
    "magenta": (1.0, 0.0, 1.0),
    "cyan": (0.0, 1.0, 1.0),
    "white": (1.0, 1.0, 1.0),
    "grey": (0.5, 0.5, 0.5),
}
COLOUR_NAMES, PALETTE = tuple(COLOURS), np.array(list(COLOURS.values()), np.float32)
SHAPES = ("circle", "square", "triangle")
# RADII, CELL and MARGIN are in pixels of a 32 x 32 image; a 64 x 64 image doubles them.
RADII = {"small": 2.5, "large": 4.0}
CELL, MARGIN = 10, 1
FINE = 8  # samples along each side of a pixel: edges and motions are resolved to 1/8 of a pixel

Thing = Any  # a frozen dataclass of words that describes one shape; each source has its own
Kind = tuple[str, ...]  # the words that a mask stands for
Part = tuple[Thing, tuple[slice, ...], np.ndarray, np.ndarray]  # thing, window, mask in the window, colour


def scale_of(size: int) -> int:
    """Returns an image's side divided by 32.

    Raises:
      InputError: `size` is neither 32 nor 64.
    """
    if size not in (32, 64):
        raise InputError("size", f"must be 32 or 64, got {size}")
    return size // 32


def cell(number: int, scale: int) -> slice:
    """Returns the pixels of the first, second or third cell along a side."""
    start = (MARGIN + number * CELL) * scale
    return slice(start, start + CELL * scale)


def tile(shape: str, radius: float, down: float = 0.0, right: float = 0.0) -> np.ndarray:
    """Returns the fraction of every pixel that a shape covers.

    Args:
      shape: One of `SHAPES`.
      radius: In pixels.
      down, right: Fractions of a pixel by which to shift the shape, multiples of 1 / FINE.

    Returns:
      `[h, w]` float32: the smallest square with an even side that holds the shape, with one more row or column if the
      shape is shifted down or right.
    """
    side = 2 * math.ceil(radius)

    def offsets(shift: float) -> np.ndarray:
        pixels = side + (shift > 0)
        return (np.arange(pixels * FINE) + 0.5) / FINE - side / 2 - shift

    y, x = offsets(down)[:, None], offsets(right)
    if shape == "circle":
        inside = x**2 + y**2 <= radius**2
    elif shape == "square":  # with about the area of the circle
        inside = (abs(x) <= 0.875 * radius) & (abs(y) <= 0.875 * radius)
    else:
        inside = (abs(y) <= radius) & (2 * abs(x) <= y + radius)
    height, width = len(y) // FINE, len(x) // FINE
    return inside.reshape(height, FINE, width, FINE).mean(axis=(1, 3)).astype(np.float32)


def place(tile: np.ndarray, height: int, width: int, top: int, left: int) -> np.ndarray:
    """Returns an empty mask `[height, width]` with a tile placed on it."""
    mask = np.zeros((height, width), np.float32)
    mask[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return mask


class Templates:
    """All masks that one window of an image can have.

    Attributes:
      masks: `[M, ...]` float32 in [0, 1]; those of one kind are adjacent.
      kinds: The kind of each of the M masks.
      spans: For each kind, the index of its first mask and the number of its masks.
    """

    def __init__(self, masks: Mapping[Kind, Sequence[np.ndarray]]):
        self.masks = np.stack([mask for group in masks.values() for mask in group])
        self.kinds = [kind for kind, group in masks.items() for _ in group]
        self.spans = {kind: (self.kinds.index(kind), len(group)) for kind, group in masks.items()}
        self._flat = self.masks.reshape(len(self.masks), -1)
        self._energy = np.outer((self._flat**2).sum(axis=1), (PALETTE**2).sum(axis=1))

    def nearest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Finds the mask and colour with the least squared error, the most likely ones under white Gaussian noise.

        Args:
          x: Windows `[N, ..., 3]` in [-1, 1].

        Returns:
          The index of the mask, the index of the colour, and the squared error of plain black minus theirs, `[N]` each.
          Where the last is not positive, plain black is nearest.
        """
        y = (np.asarray(x, np.float32).reshape(len(x), self._flat.shape[1], 3) + 1) / 2
        channels = y.swapaxes(1, 2).reshape(-1, self._flat.shape[1])
        overlap = (channels @ self._flat.T).reshape(len(x), 3, len(self._flat)).swapaxes(1, 2)  # [N, M, 3]
        gain = (4 * (2 * overlap @ PALETTE.T - self._energy)).reshape(len(x), self._energy.size)
        best = gain.argmax(axis=1)
        mask, colour = np.divmod(best, len(PALETTE))
        return mask, colour, np.take_along_axis(gain, best[:, None], axis=1)[:, 0]


class ProceduralSource:
    """Base class of sources that draw every example from its index.

    A subclass chooses the parts of an example (`_parts`), describes one in words (`phrase`) and finds the parts in
    pixels (`closest`).
    """

    def __init__(self, spec: Spec, split: Literal["train", "test"], seed: int, length: int):
        if not 0 <= seed < 2**64:
            raise InputError("seed", f"must be in [0, 2^64), got {seed}")
        if not 1 <= length < 2**63:
            raise InputError("length", f"must be in [1, 2^63), got {length}")
        self.spec, self.length = spec, length
        self._stream = struct.pack("<QB", seed, split == "test")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        randbelow = self._generator(index)
        parts = self._parts(randbelow)
        example = {"x": self._paint(parts), "cond": {}}
        if self.spec.captions:
            example["caption"] = self._caption([part[0] for part in parts], randbelow)
        return example

    @staticmethod
    def phrase(thing: Thing) -> str:
        """Returns the description of one thing."""
        raise NotImplementedError

    @classmethod
    def caption(cls, things: Iterable[Thing]) -> str:
        """Returns the caption of one or more things, in the order given."""
        *others, last = map(cls.phrase, things)
        return f"{', '.join(others)} and {last}" if others else last

    def things(self, index: int) -> tuple[Thing, ...]:
        """Returns the things in an example, in the order of its caption."""
        return tuple(part[0] for part in self._parts(self._generator(index)))

    def read(self, x: np.ndarray) -> frozenset[Thing]:
        """Returns the things in one example `x` in [-1, 1]; see `closest`, which reads a batch."""
        return self.closest(np.asarray(x)[None])[0][0]

    def closest(self, x: np.ndarray) -> tuple[list[frozenset[Thing]], np.ndarray]:
        """Finds, for each `x`, the image of things that is nearest in squared error.

        The image may hold more things than the source ever draws, or none.

        Args:
          x: `[N, ...]` in [-1, 1].

        Returns:
          The things in each image, and the images `[N, ...]` float32.
        """
        raise NotImplementedError

    def _parts(self, randbelow: Callable[[int], int]) -> list[Part]:
        raise NotImplementedError

    def _caption(self, things: Sequence[Thing], randbelow: Callable[[int], int]) -> str:
        return self.caption(things)

    def _paint(self, parts: Iterable[Part]) -> np.ndarray:
        x = np.full(self.spec.shape, -1, np.float32)
        for _, window, mask, colour in parts:
            x[window] = 2 * mask[..., None] * colour - 1
        return x

    def _generator(self, index: int) -> Callable[[int], int]:
        """Returns `randbelow(n)`, which draws successive random integers in [0, n) for one example."""
        index = operator.index(index)
        if not 0 <= index < self.length:
            raise IndexError(f"index {index} is out of range for {self.length} examples")
        digest = hashlib.blake2b(self._stream + struct.pack("<Q", index), digest_size=32).digest()
        rest = int.from_bytes(digest, "little")

        def randbelow(n: int) -> int:
            nonlocal rest
            rest, digit = divmod(rest, n)
            return digit

        return randbelow
