"""The real data that metrics compare samples with."""

import numpy as np

from diffusion.core.arrays import scaled
from diffusion.core.types import Source


def all_of(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Returns all examples of a small source as float64 vectors `[N, D]`, and their labels `[N]` (zeros if absent)."""
    examples = [source[index] for index in range(len(source))]
    x = np.stack([np.ravel(scaled(example["x"])) for example in examples]).astype(np.float64)
    return x, np.array([example["cond"].get("label", 0) for example in examples])
