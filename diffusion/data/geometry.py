"""Coloured shapes on black: their masks, their words, and the search for the mask and the colour nearest to pixels.

What is random here follows from numbers alone, and is the same on every machine and with every version of NumPy: the
draws are digits of a hash, and every pixel is a multiple of 1/64, which float32 holds.
"""

import hashlib
import math
import operator
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from diffusion.core.types import InputError, Spec

# No two are nearer than 1.7 in [-1, 1], black included.
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
# In pixels of a picture of 32 x 32, as are the next two; a picture of 64 x 64 has all of them doubled.
RADII = {"small": 2.5, "large": 4.0}
CELL, MARGIN = 10, 1
FINE = 8  # samples along each side of a pixel: the steps of an edge, and of a motion, are 1/8 of it

Thing = Any  # a frozen dataclass of words, each set of pictures its own
Kind = tuple[str, ...]  # the words that a mask stands for
Part = tuple[Thing, tuple[slice, ...], np.ndarray, np.ndarray]  # a thing, its window, the mask there and the colour


def scale_of(size: int) -> int:
    """How many times 32 a picture's side is. Raises InputError for what is neither 32 nor 64."""
    if size not in (32, 64):
        raise InputError("size", f"must be 32 or 64, got {size}")
    return size // 32


def cell(number: int, scale: int) -> slice:
    """The pixels of the first, second or third cell along a side."""
    start = (MARGIN + number * CELL) * scale
    return slice(start, start + CELL * scale)


def tile(shape: str, radius: float, down: float = 0.0, right: float = 0.0) -> np.ndarray:
    """The share of every pixel that a shape covers, `[h, w]` float32, on the smallest square of an even side that holds
    it; with a row or a column more where it is moved down or right by a fraction of a pixel, a multiple of 1 / FINE."""
    side = 2 * math.ceil(radius)

    def offsets(moved: float) -> np.ndarray:
        pixels = side + (moved > 0)
        return (np.arange(pixels * FINE) + 0.5) / FINE - side / 2 - moved

    y, x = offsets(down)[:, None], offsets(right)
    if shape == "circle":
        inside = x**2 + y**2 <= radius**2
    elif shape == "square":  # of about the circle's area
        inside = (abs(x) <= 0.875 * radius) & (abs(y) <= 0.875 * radius)
    else:
        inside = (abs(y) <= radius) & (2 * abs(x) <= y + radius)
    height, width = len(y) // FINE, len(x) // FINE
    return inside.reshape(height, FINE, width, FINE).mean(axis=(1, 3)).astype(np.float32)


def placed(part: np.ndarray, height: int, width: int, top: int, left: int) -> np.ndarray:
    """A tile on an empty canvas."""
    canvas = np.zeros((height, width), np.float32)
    canvas[top : top + part.shape[0], left : left + part.shape[1]] = part
    return canvas


class Templates:
    """All masks that one window of a picture can have.

    Attributes:
      masks: `[M, ...]` float32 in [0, 1], those of one kind next to each other.
      kinds: what each of the M stands for.
      spans: of each kind, its first mask and the number of them.
    """

    def __init__(self, masks: Mapping[Kind, Sequence[np.ndarray]]):
        self.masks = np.stack([mask for those in masks.values() for mask in those])
        self.kinds = [kind for kind, those in masks.items() for _ in those]
        self.spans = {kind: (self.kinds.index(kind), len(those)) for kind, those in masks.items()}
        self._flat = self.masks.reshape(len(self.masks), -1)
        self._energy = np.outer((self._flat**2).sum(axis=1), (PALETTE**2).sum(axis=1))

    def nearest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The mask and the colour whose picture has the least squared error, which under white Gaussian noise is the
        likeliest.

        Args:
          x: windows `[N, ..., 3]` in [-1, 1].

        Returns:
          The number of the mask, the number of the colour, and by how much they lower the squared error of plain
          black; `[N]` each. Where that is not above 0, black is the nearest.
        """
        y = (np.asarray(x, np.float32).reshape(len(x), self._flat.shape[1], 3) + 1) / 2
        channels = y.swapaxes(1, 2).reshape(-1, self._flat.shape[1])
        overlap = (channels @ self._flat.T).reshape(len(x), 3, len(self._flat)).swapaxes(1, 2)  # [N, M, 3]
        gain = (4 * (2 * overlap @ PALETTE.T - self._energy)).reshape(len(x), self._energy.size)
        best = gain.argmax(axis=1)
        mask, colour = np.divmod(best, len(PALETTE))
        return mask, colour, np.take_along_axis(gain, best[:, None], axis=1)[:, 0]


class Vocabulary:
    """Captions of some things, and the way back.

    Args:
      phrase: of one thing.
      things: all that there are, each with a phrase of its own.
      together: whether things are those of one picture.
    """

    def __init__(
        self, phrase: Callable[[Thing], str], things: Iterable[Thing], together: Callable[[Iterable[Thing]], bool]
    ):
        self.phrase, self.together = phrase, together
        self.things = {phrase(thing): thing for thing in things}

    def caption(self, things: Iterable[Thing]) -> str:
        """The phrases of one thing or more, in the order given."""
        *others, last = map(self.phrase, things)
        return f"{', '.join(others)} and {last}" if others else last

    def parse(self, text: str) -> frozenset[Thing]:
        """The inverse of `caption`, up to the order.

        Raises:
          ValueError: for any text that is not to the letter a caption of a picture that there is.
        """
        found = []
        for phrase in text.replace(" and ", ", ").split(", "):
            if phrase not in self.things:
                raise ValueError(f"{phrase!r} is no phrase of a caption, such as {next(iter(self.things))!r}")
            found.append(self.things[phrase])
        if not self.together(found) or self.caption(found) != text:
            raise ValueError(f"{text!r} is no caption of one picture")
        return frozenset(found)


class Drawn:
    """A source that draws its examples, each from its index. A set of pictures says what its parts are (`_parts`) and
    reads them back (`closest`); `vocabulary` has its words."""

    vocabulary: Vocabulary

    def __init__(self, spec: Spec, split: Literal["train", "test"], seed: int, length: int):
        if not 0 <= seed < 2**64:
            raise InputError("seed", f"must be at least 0 and less than 2^64, got {seed}")
        if not 1 <= length < 2**63:
            raise InputError("length", f"must be at least 1 and less than 2^63, got {length}")
        self.spec, self.length = spec, length
        self._stream = struct.pack("<QB", seed, split == "test")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        parts = self._parts(self._below(index))
        example = {"x": self._paint(parts), "cond": {}}
        if self.spec.captions:
            example["caption"] = self.vocabulary.caption(part[0] for part in parts)
        return example

    def things(self, index: int) -> tuple[Thing, ...]:
        """What is to be seen in an example, in its caption's order."""
        return tuple(part[0] for part in self._parts(self._below(index)))

    def caption(self, things: Iterable[Thing]) -> str:
        """A caption that names things in the order given."""
        return self.vocabulary.caption(things)

    def parse_caption(self, text: str) -> frozenset[Thing]:
        """The things of a caption. Raises ValueError for text that is not to the letter a caption of this kind."""
        return self.vocabulary.parse(text)

    def read(self, x: np.ndarray) -> frozenset[Thing]:
        """What is to be seen in one `x`, in [-1, 1]: the things of the picture nearest to it in squared error. They may
        be more than the set ever draws, or none: see `closest`, which reads many."""
        return self.closest(np.asarray(x)[None])[0][0]

    def closest(self, x: np.ndarray) -> tuple[list[frozenset[Thing]], np.ndarray]:
        """Reads `x [N, ...]`, in [-1, 1].

        Returns:
          The things of each, and the pictures `[N, ...]` float32 that were found the nearest.
        """
        raise NotImplementedError

    def _parts(self, below: Callable[[int], int]) -> list[Part]:
        raise NotImplementedError

    def _paint(self, parts: Iterable[Part]) -> np.ndarray:
        x = np.full(self.spec.shape, -1, np.float32)
        for _, window, mask, colour in parts:
            x[window] = 2 * mask[..., None] * colour - 1
        return x

    def _below(self, index: int) -> Callable[[int], int]:
        """`below(n)`, an example's own draws from 0 .. n - 1, one after the other."""
        index = operator.index(index)
        if not 0 <= index < self.length:
            raise IndexError(f"there are {self.length} examples, no number {index}")
        digest = hashlib.blake2b(self._stream + struct.pack("<Q", index), digest_size=32).digest()
        rest = int.from_bytes(digest, "little")

        def below(n: int) -> int:
            nonlocal rest
            rest, digit = divmod(rest, n)
            return digit

        return below
