"""scikit-learn's handwritten digits: 1,797 real 8x8 grey images of 10 classes, shipped with the package."""

from typing import Any, Literal

import numpy as np
import sklearn.datasets

from diffusion.core.types import Spec

TRAIN_SIZE = 1500


class Digits:
    """Images `[8, 8, 1]` in [-1, 1] with `label`, one of two fixed splits."""

    spec = Spec(shape=(8, 8, 1), num_classes=10, low=0.0, high=16.0)

    def __init__(self, split: Literal["train", "test"]):
        images, labels = sklearn.datasets.load_digits(return_X_y=True)
        # The set is ordered by writer: a shuffle that never changes gives both splits the same writers.
        order = np.random.RandomState(0).permutation(len(images))
        order = order[:TRAIN_SIZE] if split == "train" else order[TRAIN_SIZE:]
        self.images = (images[order].reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
        self.labels = labels[order].astype(np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.images[index], "cond": {"label": self.labels[index]}}


def make(split: Literal["train", "test"] = "train") -> Digits:
    """Args: `split`, `train` (1,500 images) or `test` (the other 297)."""
    return Digits(split)
