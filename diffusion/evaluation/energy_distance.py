"""The energy distance between samples and held-out data, in units of that between real and held-out data."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist

from diffusion.core import checks
from diffusion.core.types import Source
from diffusion.evaluation.reference import all_of


@dataclasses.dataclass
class Sums:
    """The samples so far, which later ones are compared with, and sums of the distances between them.

    Attributes:
      x: Batches of vectors `[B, D]`.
      within: Sum of the distances of all ordered pairs of samples.
      across: Sum of the distances between samples and held-out examples.
    """

    x: list[np.ndarray]
    within: float = 0.0
    across: float = 0.0


class EnergyDistance:
    """A `SampleMetric`.

    The energy distance is 2 E|X - Y| - E|X - X'| - E|Y - Y'|, here the V-statistic of n samples x and all held-out
    examples y, which is non-negative (Szekely & Rizzo 2013, eq. 6.1). It is positive on average even if both have the
    same distribution, the more so the smaller n is. It is therefore divided by its expectation for n training examples,

        2 mean|x - y| - (1 - 1/n) U - mean|y - y'|,    U: the mean distance of two different training examples,

    so that its expected value is 1 for samples as good as the training data, however many there are. It is higher for
    memorized, blurred or biased ones.
    """

    kind, names = "samples", ("energy_distance_ratio",)

    def __init__(self, num: int, guidance: float, train: Source, held_out: Source):
        self.num, self.guidance = num, guidance
        real, _ = all_of(train)
        self.held_out, _ = all_of(held_out)
        self.real_across = cdist(real, self.held_out).mean()
        self.real_within = cdist(real, real).sum() / max(len(real) * (len(real) - 1), 1)
        self.held_out_within = cdist(self.held_out, self.held_out).mean()

    def init(self) -> Sums:
        return Sums([])

    def update(self, state: Sums, images: np.ndarray, conditions: Mapping[str, Any]) -> Sums:
        x = images.reshape(len(images), -1)
        state.within += cdist(x, x).sum() + 2 * sum(cdist(x, other).sum() for other in state.x)
        state.across += cdist(x, self.held_out).sum()
        state.x.append(x)
        return state

    def result(self, state: Sums) -> dict[str, float]:
        num = sum(map(len, state.x))
        distance = 2 * state.across / (num * len(self.held_out)) - state.within / num**2 - self.held_out_within
        unit = 2 * self.real_across - (1 - 1 / num) * self.real_within - self.held_out_within
        return {"energy_distance_ratio": float(distance / unit)}


def make(train: Source, held_out: Source, num: int = 1000, guidance: float = 1.0) -> EnergyDistance:
    """Builds the metric.

    Args:
      num: Number of samples.
      guidance: Guidance scale of the samples.
    """
    checks.at_least(1, num=num)
    return EnergyDistance(num, guidance, train, held_out)
