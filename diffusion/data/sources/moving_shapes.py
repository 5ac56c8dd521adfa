"""Videos of coloured shapes moving on black, with English captions, and a reader that finds the shapes in a sample."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffusion.core import checks
from diffusion.core.types import ArraySpec, InputError, Spec
from diffusion.data import geometry
from diffusion.data.geometry import COLOUR_NAMES, FINE, PALETTE, RADII, SHAPES

STILL = "standing still"
# The lanes of a video are either all rows or all columns. Shapes move along their lane.
LANES = {
    "rows": {"top": "at the top", "middle": "in the middle", "bottom": "at the bottom"},
    "columns": {"left": "on the left", "middle": "in the middle", "right": "on the right"},
}
MOTIONS = {
    "rows": (STILL, "moving right", "moving left"),
    "columns": (STILL, "moving down", "moving up"),
}


@dataclass(frozen=True)
class Mover:
    """One shape: `size` of RADII, `colour` of COLOURS, `shape` of SHAPES, `lane` of LANES and `motion` of MOTIONS, all
    words."""

    size: str
    colour: str
    shape: str
    lane: str
    motion: str


class MovingShapes(geometry.ProceduralSource):
    """Videos `[frames, size, size, 3]` in [-1, 1] of a few shapes, each in a separate lane; see `make`."""

    def __init__(
        self, size: int, frames: int, max_things: int, split: Literal["train", "test"], seed: int, captions: bool,
        length: int,
    ):  # fmt: skip
        super().__init__(Spec(ArraySpec((frames, size, size, 3), "video"), captions=captions), split, seed, length)
        self.max_things = max_things
        self._still, self._moving = _templates(size, frames)
        self._cells = [geometry.cell(number, geometry.scale_of(size)) for number in range(3)]

    @staticmethod
    def phrase(thing: Mover) -> str:
        where = next(lanes[thing.lane] for lanes in LANES.values() if thing.lane in lanes)
        return f"a {thing.size} {thing.colour} {thing.shape} {where} {thing.motion}"

    def draws(self, things: frozenset[Mover]) -> bool:
        """Returns whether the source draws videos of these things.

        Each must have a separate lane, the lanes must be all rows or all columns, and at least one thing must move: a
        video in which everything is still could be read as either.
        """
        return (
            1 <= len(things) <= self.max_things
            and len({thing.lane for thing in things}) == len(things)
            and any(thing.motion != STILL for thing in things)
            and any(
                all(thing.lane in LANES[direction] and thing.motion in MOTIONS[direction] for thing in things)
                for direction in LANES
            )
        )

    def closest(self, x: np.ndarray) -> tuple[list[frozenset[Mover]], np.ndarray]:
        readings = [self._read_lanes(x, direction) for direction in LANES]
        found = [max(both, key=lambda reading: reading[0])[1] for both in zip(*readings, strict=True)]
        things = [frozenset(part[0] for part in parts) for parts in found]
        return things, np.array([self._paint(parts) for parts in found]).reshape(-1, *self.spec.shape)

    def _read_lanes(self, x: np.ndarray, direction: str) -> list[tuple[float, list[geometry.Part]]]:
        """Finds the nearest contents of the rows, or columns, of each video.

        Returns:
          For each video, the squared error of plain black minus that of the contents, and the contents.
        """
        readings = [(0.0, []) for _ in x]
        for lane, window in zip(LANES[direction], self._windows(direction), strict=True):
            lanes = x[:, *window]
            # For a still mask, the gain over all frames is the gain for the mean frame times the number of frames.
            mask, colour, gain = self._still[direction].nearest(lanes.mean(axis=1))
            candidates = [
                (self._still[direction], mask, colour, gain * x.shape[1]),
                (self._moving[direction], *self._moving[direction].nearest(lanes)),
            ]
            for n, (total, parts) in enumerate(readings):
                each = [(table, mask[n], colour[n], gain[n]) for table, mask, colour, gain in candidates]
                table, mask, colour, gain = max(each, key=lambda candidate: candidate[3])
                if gain > 0:
                    readings[n] = total + gain, [*parts, self._part(lane, window, table, mask, colour)]
        return readings

    def _parts(self, randbelow: Callable[[int], int]) -> list[geometry.Part]:
        direction = tuple(LANES)[randbelow(2)]
        free = list(zip(LANES[direction], self._windows(direction), strict=True))
        count = 1 + randbelow(self.max_things)
        # One base-3 digit per thing, where 0 means still; the number is positive, so not everything is still.
        motions = 1 + randbelow(3**count - 1)
        parts = []
        for _ in range(count):
            lane, window = free.pop(randbelow(len(free)))
            motions, motion = divmod(motions, 3)
            table = self._moving[direction] if motion else self._still[direction]
            first, number = table.spans[tuple(RADII)[randbelow(2)], SHAPES[randbelow(3)], MOTIONS[direction][motion]]
            parts.append(self._part(lane, window, table, first + randbelow(number), randbelow(len(PALETTE))))
        return parts

    def _part(
        self, lane: str, window: tuple[slice, ...], table: geometry.Templates, mask: int, colour: int
    ) -> geometry.Part:
        size, shape, motion = table.kinds[mask]
        thing = Mover(size, COLOUR_NAMES[colour], shape, lane, motion)
        return thing, window, table.masks[mask], PALETTE[colour]

    def _windows(self, direction: str) -> list[tuple[slice, ...]]:
        everything = slice(None)
        return [
            (everything, cell) if direction == "rows" else (everything, everything, cell) for cell in self._cells
        ]  # fmt: skip


def make(
    size: int = 32,
    frames: int = 8,
    max_things: int = 3,
    split: Literal["train", "test"] = "train",
    seed: int = 0,
    captions: bool = False,
    length: int = 2**31 - 1,
) -> MovingShapes:
    """Draws one to `max_things` circles, squares and triangles, small or large, in eight colours, in separate lanes.

    The lanes of a video are either its rows, along which shapes move left or right, or its columns, along which they
    move up or down. They move at constant speed from one end to the other, at multiples of 1/8 pixel. Other shapes
    stand still, anywhere in their lane at whole pixels. At least one shape moves in every video. All choices are
    equally likely.

    Args:
      size: Side of the frames in pixels, 32 or 64.
      frames: Number of frames, at least 2.
      max_things: Maximum number of shapes, from 1 to 3.
      split: `train` or `test`, independent draws.
      seed: Seed of the draws, at least 0.
      captions: Whether an example has a `caption`, such as "a small red circle at the top moving right and a large blue
        square at the bottom standing still".
      length: Number of examples. Each is drawn from its index when it is read, so a large number costs nothing.
    """
    geometry.scale_of(size)
    checks.at_least(2, frames=frames)
    if not 1 <= max_things <= 3:
        raise InputError("max_things", f"must be from 1 to 3, at most one per lane, got {max_things}")
    return MovingShapes(size, frames, max_things, split, seed, captions, length)


Tables = dict[str, geometry.Templates]  # for rows and for columns


@functools.cache
def _templates(size: int, frames: int) -> tuple[Tables, Tables]:
    """Returns the masks of still shapes in a lane, `[h, w]` for one frame, and of moving ones, `[frames, h, w]`."""
    scale = geometry.scale_of(size)
    side = geometry.CELL * scale
    still, moving = {}, {}
    for direction, (stays, forward, backward) in MOTIONS.items():
        along_row = direction == "rows"

        def place(tile: np.ndarray, along: int, across: int, along_row: bool = along_row) -> np.ndarray:
            if along_row:
                return geometry.place(tile, side, size, across, along)
            return geometry.place(tile, size, side, along, across)

        still_masks, moving_masks = {}, {}
        for name, shape in itertools.product(RADII, SHAPES):
            radius = RADII[name] * scale
            tile = geometry.tile(shape, radius)
            starts, distance = range(side - len(tile) + 1), size - len(tile)
            still_masks[name, shape, stays] = [
                place(tile, along, across) for along in range(distance + 1) for across in starts
            ]
            path = []
            for frame in range(frames):
                # The position in eighths of a pixel, rounded to the nearest with integers alone.
                eighths = (2 * FINE * distance * frame + frames - 1) // (2 * (frames - 1))
                along, rest = divmod(eighths, FINE)
                shift = (0.0, rest / FINE) if along_row else (rest / FINE, 0.0)
                path.append((geometry.tile(shape, radius, *shift), along))
            paths = [np.stack([place(tile, along, across) for tile, along in path]) for across in starts]
            moving_masks[name, shape, forward] = paths
            moving_masks[name, shape, backward] = [path[::-1] for path in paths]
        still[direction], moving[direction] = geometry.Templates(still_masks), geometry.Templates(moving_masks)
    return still, moving
