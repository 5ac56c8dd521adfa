"""How many samples are pictures that the data could have: of as many shapes, each of them whole and in its place."""

from collections import Counter

import numpy as np

from diffusion.core.types import InputError, Source

CHUNK = 250  # samples read at a time


class ReadableShapes:
    """The data's own parser finds the picture nearest to a sample. The sample is readable if the data has such pictures
    and if it is close to this one everywhere: in each ninth of each frame. The whole frame's mean would not do: it is
    mostly black, and half of a shape may be missing before it shows."""

    def __init__(self, num: int, guidance: float, limit: float, held_out: Source):
        self.num, self.guidance, self.limit, self.source = num, guidance, limit, held_out
        real = range(min(10_000, len(held_out)))
        self.counts = _shares([len(held_out.things(index)) for index in real])

    def __call__(self, x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Args: `x [N, ..., H, W, 3]` in [-1, 1]; the labels are not looked at.

        Returns:
          readable_shapes: share of the samples that are readable.
          shapes_off: the median over samples of the RMS error, in their worst ninth, of the picture nearest to them.
          shape_count_distance: total variation between the numbers of shapes in samples and in the data, 0 to 1.
        """
        things, worst = [], []
        for start in range(0, len(x), CHUNK):
            those = x[start : start + CHUNK]
            found, pictures = self.source.closest(those)
            things += found
            worst.append(_worst_ninth(those - pictures))
        worst = np.concatenate(worst)
        drawn = np.array([self.source.draws(those) for those in things])
        counts = _shares([len(those) for those in things])
        return {
            "readable_shapes": float((drawn & (worst < self.limit)).mean()),
            "shapes_off": float(np.median(worst)),
            "shape_count_distance": sum(abs(counts[n] - self.counts[n]) for n in counts | self.counts) / 2,
        }


def make(train: Source, held_out: Source, num: int = 1000, guidance: float = 1.0, limit: float = 0.2) -> ReadableShapes:
    """Args:
    num, guidance: how many samples, and how they are drawn.
    limit: of the RMS error of a readable sample in its worst ninth, of values in [-1, 1]. Noise of deviation 0.15 is
      below 0.2, and so is a blur of half a pixel; a shape cut in half, or a cross of two, is mostly above it.
    """
    if num < 1:
        raise InputError("num", f"must be at least 1, got {num}")
    if limit <= 0:
        raise InputError("limit", f"must be above 0, got {limit}")
    if not all(hasattr(held_out, name) for name in ("read", "closest", "draws", "things")):
        raise InputError("name", "readable_shapes needs data that can be read: shapes or moving_shapes")
    return ReadableShapes(num, guidance, limit, held_out)


def _worst_ninth(error: np.ndarray) -> np.ndarray:
    """The highest RMS `[N]` over the 3 x 3 parts of every frame of `[N, ..., H, W, 3]`."""

    def means(squares: np.ndarray, axis: int) -> np.ndarray:
        return np.stack([part.mean(axis) for part in np.array_split(squares, 3, axis)], axis)

    squares = means(means((error**2).mean(axis=-1), -1), -2)
    return np.sqrt(squares.reshape(len(error), -1).max(axis=1))


def _shares(numbers: list[int]) -> Counter:
    return Counter({number: count / len(numbers) for number, count in Counter(numbers).items()})
