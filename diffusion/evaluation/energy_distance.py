"""The energy distance between samples and held-out data, relative to that between training and held-out data."""

import numpy as np
from scipy.spatial.distance import cdist

from diffusion.core import checks
from diffusion.core.types import Source
from diffusion.evaluation.reference import all_of


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Returns 2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of vectors `[N, D]` and `[M, D]`.

    This is the V-statistic, which is non-negative (Szekely & Rizzo 2013, eq. 6.1).
    """
    return 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()


class EnergyDistance:
    """A `SampleMetric`.

    It is about 1 for samples as good as the training data, and higher for memorized, blurred or biased ones.
    """

    def __init__(self, num: int, guidance: float, train: Source, held_out: Source):
        self.num, self.guidance = num, guidance
        self.held_out, _ = all_of(held_out)
        self.unit = energy_distance(all_of(train)[0], self.held_out)

    def __call__(self, x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns `energy_distance_ratio` of samples `x [N, ...]` in [-1, 1]; the labels are ignored."""
        return {"energy_distance_ratio": float(energy_distance(x.reshape(len(x), -1), self.held_out) / self.unit)}


def make(train: Source, held_out: Source, num: int = 1000, guidance: float = 1.0) -> EnergyDistance:
    """Builds the metric.

    Args:
      num: Number of samples.
      guidance: Guidance scale of the samples.
    """
    checks.at_least(1, num=num)
    return EnergyDistance(num, guidance, train, held_out)
