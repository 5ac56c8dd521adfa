"""Videos of coloured shapes that move on black, with English captions, and a parser that says what a sample shows."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np

from diffusion.core.types import InputError, Spec
from diffusion.data import geometry
from diffusion.data.geometry import COLOUR_NAMES, FINE, PALETTE, RADII, SHAPES

STILL = "standing still"
# The lanes of a video are all rows or all columns. The motions go up and down the axis that a lane lies along.
LANES = {
    "rows": {"top": "at the top", "middle": "in the middle", "bottom": "at the bottom"},
    "columns": {"left": "on the left", "middle": "in the middle", "right": "on the right"},
}
MOTIONS = {
    "rows": (STILL, "moving right", "moving left"),
    "columns": (STILL, "moving down", "moving up"),
}


@dataclasses.dataclass(frozen=True)
class Mover:
    """One shape: `size` of RADII, `colour` of COLOURS, `shape` of SHAPES, `lane` of LANES and `motion` of MOTIONS, all
    words."""

    size: str
    colour: str
    shape: str
    lane: str
    motion: str


def _phrase(mover: Mover) -> str:
    where = next(lanes[mover.lane] for lanes in LANES.values() if mover.lane in lanes)
    return f"a {mover.size} {mover.colour} {mover.shape} {where} {mover.motion}"


def _one_video(movers: Iterable[Mover]) -> bool:
    """One mover a lane, all lanes rows or all columns, and not everything still: that could be read as either."""
    movers = list(movers)
    lanes = [mover.lane for mover in movers]
    return (
        len(set(lanes)) == len(lanes)
        and any(mover.motion != STILL for mover in movers)
        and any(
            all(mover.lane in LANES[way] and mover.motion in MOTIONS[way] for mover in movers) for way in LANES
        )
    )  # fmt: skip


VOCABULARY = geometry.Vocabulary(
    _phrase,
    [
        Mover(*words)
        for way in LANES
        for words in itertools.product(RADII, COLOUR_NAMES, SHAPES, LANES[way], MOTIONS[way])
    ],
    _one_video,
)


class MovingShapes(geometry.Drawn):
    """Videos `[frames, size, size, 3]` in [-1, 1], each of a few shapes in lanes of their own; see `make`."""

    vocabulary = VOCABULARY

    def __init__(
        self, size: int, frames: int, max_things: int, split: Literal["train", "test"], seed: int, captions: bool,
        length: int,
    ):  # fmt: skip
        super().__init__(Spec(shape=(frames, size, size, 3), captions=captions), split, seed, length)
        self.max_things = max_things
        self._still, self._moving = _templates(size, frames)
        self._cells = [geometry.cell(number, geometry.scale_of(size)) for number in range(3)]

    def draws(self, things: frozenset[Mover]) -> bool:
        """Whether the set has videos of these things."""
        return 1 <= len(things) <= self.max_things and _one_video(things)

    def closest(self, x: np.ndarray) -> tuple[list[frozenset[Mover]], np.ndarray]:
        readings = [self._read_lanes(x, way) for way in LANES]
        found = [max(both, key=lambda reading: reading[0])[1] for both in zip(*readings, strict=True)]
        things = [frozenset(part[0] for part in parts) for parts in found]
        return things, np.array([self._paint(parts) for parts in found]).reshape(-1, *self.spec.shape)

    def _read_lanes(self, x: np.ndarray, way: str) -> list[tuple[float, list[geometry.Part]]]:
        """For each video, by how much the nearest contents of its rows, or columns, lower the squared error of plain
        black, and these contents."""
        readings = [(0.0, []) for _ in x]
        for lane, window in zip(LANES[way], self._windows(way), strict=True):
            lanes = x[:, *window]
            # What stands still fits the mean frame as well as it fits each: so many times as much.
            mask, colour, gain = self._still[way].nearest(lanes.mean(axis=1))
            candidates = [
                (self._still[way], mask, colour, gain * x.shape[1]),
                (self._moving[way], *self._moving[way].nearest(lanes)),
            ]
            for n, (total, parts) in enumerate(readings):
                each = [(table, mask[n], colour[n], gain[n]) for table, mask, colour, gain in candidates]
                table, mask, colour, gain = max(each, key=lambda candidate: candidate[3])
                if gain > 0:
                    readings[n] = total + gain, [*parts, self._part(way, lane, window, table, mask, colour)]
        return readings

    def _parts(self, below: Callable[[int], int]) -> list[geometry.Part]:
        way = tuple(LANES)[below(2)]
        free = list(zip(LANES[way], self._windows(way), strict=True))
        count = 1 + below(self.max_things)
        motions = 1 + below(3**count - 1)  # a digit of base 3 for each thing: 0 is still, and not all are
        parts = []
        for _ in range(count):
            lane, window = free.pop(below(len(free)))
            motions, motion = divmod(motions, 3)
            table = self._moving[way] if motion else self._still[way]
            first, number = table.spans[tuple(RADII)[below(2)], SHAPES[below(3)], MOTIONS[way][motion]]
            parts.append(self._part(way, lane, window, table, first + below(number), below(len(PALETTE))))
        return parts

    def _part(
        self, way: str, lane: str, window: tuple[slice, ...], table: geometry.Templates, mask: int, colour: int
    ) -> geometry.Part:
        size, shape, motion = table.kinds[mask]
        thing = Mover(size, COLOUR_NAMES[colour], shape, lane, motion)
        return thing, window, table.masks[mask], PALETTE[colour]

    def _windows(self, way: str) -> list[tuple[slice, ...]]:
        everything = slice(None)
        return [(everything, cell) if way == "rows" else (everything, everything, cell) for cell in self._cells]


def make(
    size: int = 32,
    frames: int = 8,
    max_things: int = 3,
    split: Literal["train", "test"] = "train",
    seed: int = 0,
    captions: bool = False,
    length: int = 2**31 - 1,
) -> MovingShapes:
    """One to `max_things` circles, squares and triangles, small or large, of eight colours, each in a lane of its own.

    A video's lanes are its rows, along which things move left or right, or its columns, along which they move up or
    down: evenly, from one end to the other, at multiples of 1/8 pixel. Others stand still, anywhere in their lane at
    whole pixels; something moves in every video. All choices are equally likely.

    Args:
      size: of the frames' sides in pixels, 32 or 64.
      frames: at least 2.
      max_things: from 1 to 3.
      split: `train` or `test`, independent draws.
      seed: of the draws, at least 0.
      captions: whether an example has its `caption`, such as "a small red circle at the top moving right and a large
        blue square at the bottom standing still".
      length: of the set. Every example is drawn from its own index, so it costs nothing.
    """
    geometry.scale_of(size)
    if frames < 2:
        raise InputError("frames", f"must be at least 2, for a motion to be seen, got {frames}")
    if not 1 <= max_things <= 3:
        raise InputError("max_things", f"must be from 1 to 3, one for each lane, got {max_things}")
    return MovingShapes(size, frames, max_things, split, seed, captions, length)


Tables = dict[str, geometry.Templates]  # of rows and of columns


@functools.cache
def _templates(size: int, frames: int) -> tuple[Tables, Tables]:
    """What stands still in a lane, as masks `[h, w]` of one frame of it, and what moves, as `[frames, h, w]`."""
    scale = geometry.scale_of(size)
    side = geometry.CELL * scale
    still, moving = {}, {}
    for way, (stays, ahead, back) in MOTIONS.items():
        along_row = way == "rows"

        def put(tile: np.ndarray, along: int, across: int, along_row: bool = along_row) -> np.ndarray:
            if along_row:
                return geometry.placed(tile, side, size, across, along)
            return geometry.placed(tile, size, side, along, across)

        standing, going = {}, {}
        for name, shape in itertools.product(RADII, SHAPES):
            radius = RADII[name] * scale
            tile = geometry.tile(shape, radius)
            room, way_to_go = range(side - len(tile) + 1), size - len(tile)
            standing[name, shape, stays] = [
                put(tile, along, across) for along in range(way_to_go + 1) for across in room
            ]
            path = []
            for frame in range(frames):
                # The nearest 1/8 pixel, in integers.
                eighths = (2 * FINE * way_to_go * frame + frames - 1) // (2 * (frames - 1))
                along, rest = divmod(eighths, FINE)
                moved = (0.0, rest / FINE) if along_row else (rest / FINE, 0.0)
                path.append((geometry.tile(shape, radius, *moved), along))
            paths = [np.stack([put(tile, along, across) for tile, along in path]) for across in room]
            going[name, shape, ahead], going[name, shape, back] = paths, [path[::-1] for path in paths]
        still[way], moving[way] = geometry.Templates(standing), geometry.Templates(going)
    return still, moving
