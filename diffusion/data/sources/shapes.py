"""Images of coloured shapes on black, with English captions, and a reader that finds the shapes in a sample."""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffusion.core.types import ArraySpec, InputError, Spec
from diffusion.data import geometry, shape_captions
from diffusion.data.geometry import COLOUR_NAMES, PALETTE, RADII, SHAPES
from diffusion.data.shape_captions import PLACES, UNSEEN

Captions = bool | Literal["full", "varied"]
Combinations = Literal["all", "seen", "unseen"]


@dataclass(frozen=True)
class Thing:
    """One shape: `size` of RADII, `colour` of COLOURS, `shape` of SHAPES and `place` of PLACES, all words."""

    size: str
    colour: str
    shape: str
    place: str


class Shapes(geometry.ProceduralSource):
    """Images `[size, size, 3]` in [-1, 1] of a few shapes, each in a separate cell; see `make`."""

    def __init__(
        self, size: int, max_things: int, split: Literal["train", "test"], seed: int, captions: Captions, length: int,
        combinations: Combinations,
    ):  # fmt: skip
        super().__init__(Spec(ArraySpec((size, size, 3)), captions=bool(captions)), split, seed, length)
        self.max_things, self.captions, self.combinations = max_things, captions, combinations
        self._templates = _templates(size)
        cells = [geometry.cell(number, geometry.scale_of(size)) for number in range(3)]
        self._windows = list(itertools.product(cells, cells))  # in the order of PLACES

    @staticmethod
    def phrase(thing: Thing) -> str:
        return f"a {thing.size} {thing.colour} {thing.shape} {PLACES[thing.place]}"

    def draws(self, things: frozenset[Thing]) -> bool:
        """Returns whether the source draws images of these things."""
        places = {thing.place for thing in things}
        unseen = any((thing.colour, thing.shape) in UNSEEN for thing in things)
        allowed = self.combinations == "all" or unseen == (self.combinations == "unseen")
        return allowed and 1 <= len(things) <= self.max_things and len(places) == len(things)

    def closest(self, x: np.ndarray) -> tuple[list[frozenset[Thing]], np.ndarray]:
        found = [[] for _ in x]
        for place, window in zip(PLACES, self._windows, strict=True):
            for parts, mask, colour, gain in zip(found, *self._templates.nearest(x[:, *window]), strict=True):
                if gain > 0:
                    parts.append(self._part(place, window, mask, colour))
        things = [frozenset(part[0] for part in parts) for parts in found]
        return things, np.array([self._paint(parts) for parts in found]).reshape(-1, *self.spec.shape)

    def _parts(self, randbelow: Callable[[int], int]) -> list[geometry.Part]:
        free = list(zip(PLACES, self._windows, strict=True))
        count = 1 + randbelow(self.max_things)
        required = randbelow(count) if self.combinations == "unseen" else None  # the thing of an unseen pair
        parts = []
        for number in range(count):
            place, window = free.pop(randbelow(len(free)))
            size, shape = tuple(RADII)[randbelow(2)], SHAPES[randbelow(3)]
            first, masks = self._templates.spans[size, shape]
            mask = first + randbelow(masks)
            # Whether the pair of colour and shape must be one of UNSEEN; None: it may be.
            unseen = True if number == required else False if self.combinations == "seen" else None
            colours = [n for n, name in enumerate(COLOUR_NAMES) if unseen in (None, (name, shape) in UNSEEN)]
            parts.append(self._part(place, window, mask, colours[randbelow(len(colours))]))
        return parts

    def _caption(self, things: Sequence[Thing], randbelow: Callable[[int], int]) -> str:
        return str(shape_captions.varied(things, randbelow)) if self.captions == "varied" else self.caption(things)

    def _part(self, place: str, window: tuple[slice, slice], mask: int, colour: int) -> geometry.Part:
        size, shape = self._templates.kinds[mask]
        thing = Thing(size, COLOUR_NAMES[colour], shape, place)
        return thing, window, self._templates.masks[mask], PALETTE[colour]


def make(
    size: int = 32,
    max_things: int = 3,
    split: Literal["train", "test"] = "train",
    seed: int = 0,
    captions: Captions = False,
    length: int = 2**31 - 1,
    combinations: Combinations = "all",
) -> Shapes:
    """Draws one to `max_things` circles, squares and triangles, small or large, in eight colours.

    Each lies in a separate cell of a 3 x 3 grid, anywhere in it at whole pixels. All choices are equally likely. So few
    images have a single shape that both splits contain most of them; with three shapes there are over 4 x 10^10.

    Args:
      size: Side of the images in pixels, 32 or 64.
      max_things: Maximum number of shapes, from 1 to 9.
      split: `train` or `test`, independent draws.
      seed: Seed of the draws, at least 0.
      captions: Whether an example has a `caption`. True or `full`: everything, such as "a large red circle at the top
        left, a small blue square in the center and a small white triangle on the right". `varied`: one of several true
        captions, such as "a red circle and two blue squares"; see `data.shape_captions`.
      length: Number of examples. Each is drawn from its index when it is read, so a large number costs nothing.
      combinations: `seen`: four of the 24 pairs of a colour and a shape, `UNSEEN`, never occur. `unseen`: every image
        has at least one shape of these four. `all`: neither.
    """
    geometry.scale_of(size)
    if not 1 <= max_things <= 9:
        raise InputError("max_things", f"must be from 1 to 9, at most one per cell of the grid, got {max_things}")
    return Shapes(size, max_things, split, seed, captions, length, combinations)


@functools.cache
def _templates(size: int) -> geometry.Templates:
    scale = geometry.scale_of(size)
    side = geometry.CELL * scale
    masks = {}
    for name, shape in itertools.product(RADII, SHAPES):
        tile = geometry.tile(shape, RADII[name] * scale)
        starts = range(side - len(tile) + 1)
        masks[name, shape] = [geometry.place(tile, side, side, top, left) for top in starts for left in starts]
    return geometry.Templates(masks)
