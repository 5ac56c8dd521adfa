"""The share of samples that the synthetic shapes data could contain: as many shapes, each complete and in place."""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.core import checks
from diffusion.core.types import InputError, Source


@dataclasses.dataclass
class Found:
    """What was found in the samples so far.

    Attributes:
      readable: Number of readable samples.
      worst: Batches of the RMS distances `[B]` to the nearest rendered image, in the worst ninth.
      counts: Number of samples by their number of shapes.
    """

    readable: int = 0
    worst: list[np.ndarray] = dataclasses.field(default_factory=list)
    counts: Counter = dataclasses.field(default_factory=Counter)


class ReadableShapes:
    """A `SampleMetric` that uses the data's parser to find the rendered image nearest to a sample.

    A sample is readable if the data can contain that image, and if the sample is close to it in each ninth of each
    frame. The mean over a whole frame is not sensitive enough: the frame is mostly black, so that half of a shape could
    be missing unnoticed. The values are
      readable_shapes: Share of the samples that are readable.
      shapes_off: Median over samples of the RMS distance to the nearest rendered image, in the worst ninth.
      shape_count_distance: Total variation distance between the distributions of the number of shapes in samples and
        data, in [0, 1].
    """

    kind, names = "samples", ("readable_shapes", "shapes_off", "shape_count_distance")

    def __init__(self, num: int, guidance: float, limit: float, held_out: Source):
        self.num, self.guidance, self.limit, self.source = num, guidance, limit, held_out
        real = range(min(10_000, len(held_out)))
        self.real = Counter(len(held_out.things(index)) for index in real)

    def init(self) -> Found:
        return Found()

    def update(self, state: Found, images: np.ndarray, conditions: Mapping[str, Any]) -> Found:
        things, rendered = self.source.closest(images)
        worst = _worst_ninth(images - rendered)
        possible = np.array([self.source.draws(shapes) for shapes in things])
        state.readable += int((possible & (worst < self.limit)).sum())
        state.worst.append(worst)
        state.counts.update(len(shapes) for shapes in things)
        return state

    def result(self, state: Found) -> dict[str, float]:
        found, real = _shares(state.counts), _shares(self.real)
        return {
            "readable_shapes": state.readable / state.counts.total(),
            "shapes_off": float(np.median(np.concatenate(state.worst))),
            "shape_count_distance": sum(abs(found[n] - real[n]) for n in found | real) / 2,
        }


def make(train: Source, held_out: Source, num: int = 1000, guidance: float = 1.0, limit: float = 0.2) -> ReadableShapes:
    """Builds the metric.

    Args:
      num: Number of samples.
      guidance: Guidance scale of the samples.
      limit: Largest RMS error of a readable sample in its worst ninth, for values in [-1, 1]. Noise of standard
        deviation 0.15 is below 0.2, and so is a blur of half a pixel; a shape cut in half, or a mixture of two, is
        mostly above it.
    """
    checks.at_least(1, num=num)
    checks.positive(limit=limit)
    if not all(hasattr(held_out, name) for name in ("read", "closest", "draws", "things")):
        raise InputError("name", "readable_shapes requires data with a parser: shapes or moving_shapes")
    return ReadableShapes(num, guidance, limit, held_out)


def _worst_ninth(error: np.ndarray) -> np.ndarray:
    """Returns the highest RMS `[N]` over the 3 x 3 parts of every frame of `[N, ..., H, W, 3]`."""

    def means(squares: np.ndarray, axis: int) -> np.ndarray:
        return np.stack([part.mean(axis) for part in np.array_split(squares, 3, axis)], axis)

    squares = means(means((error**2).mean(axis=-1), -1), -2)
    return np.sqrt(squares.reshape(len(error), -1).max(axis=1))


def _shares(counts: Counter) -> Counter:
    """Returns the relative frequency of each number."""
    return Counter({number: count / counts.total() for number, count in counts.items()})
