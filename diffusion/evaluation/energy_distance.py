"""Energy distance of samples to held-out data, in units of the training data's own distance to it."""

import numpy as np
from scipy.spatial.distance import cdist

from diffusion.core.types import InputError, Source
from diffusion.evaluation.reference import all_of


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of two sets of vectors `[N, D]`, `[M, D]`; the V-statistic, at least 0
    (Szekely & Rizzo 2013, eq. 6.1)."""
    return 2 * cdist(x, y).mean() - cdist(x, x).mean() - cdist(y, y).mean()


class EnergyDistance:
    """About 1 for samples as good as the training data; memorised, blurred or lopsided samples are all above it."""

    def __init__(self, num: int, guidance: float, train: Source, held_out: Source):
        self.num, self.guidance = num, guidance
        self.held_out, _ = all_of(held_out)
        self.unit = energy_distance(all_of(train)[0], self.held_out)

    def __call__(self, x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Args: `x [N, ...]` in [-1, 1]; the labels are not looked at."""
        return {"energy_distance_ratio": float(energy_distance(x.reshape(len(x), -1), self.held_out) / self.unit)}


def make(train: Source, held_out: Source, num: int = 1000, guidance: float = 1.0) -> EnergyDistance:
    """Args: `num` samples at `guidance`."""
    if num < 1:
        raise InputError("num", f"must be at least 1, got {num}")
    return EnergyDistance(num, guidance, train, held_out)
