"""The real data that metrics compare samples with."""

import jax
import numpy as np

from diffusion.core.arrays import scaled
from diffusion.core.types import Source


def all_of(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """Returns all examples of a small source as float64 vectors `[N, D]`, and their labels `[N]` (zeros if absent)."""
    examples = [source[index] for index in range(len(source))]
    x = np.stack([np.ravel(scaled(example["x"])) for example in examples]).astype(np.float64)
    return x, np.array([example["cond"].get("label", 0) for example in examples])


def first_of(source: Source, num: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns x, float32 `[N, ...]`, and the conditions of the first `num` examples, or of all if there are fewer."""
    examples = [source[index] for index in range(min(num, len(source)))]
    x = scaled(np.stack([example["x"] for example in examples])).astype(np.float32)
    return x, jax.tree.map(lambda *leaves: np.stack(leaves), *[dict(example["cond"]) for example in examples])
