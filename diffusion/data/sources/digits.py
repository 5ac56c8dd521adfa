"""The handwritten digits of scikit-learn: 1,797 real 8 x 8 grey images in 10 classes, shipped with that package."""

from typing import Any, Literal

import numpy as np

from diffusion.core.types import ArraySpec, Spec, class_labels

TRAIN_SIZE = 1500


class Digits:
    """Images `[8, 8, 1]` in [-1, 1] with `label`, of one of two fixed splits."""

    spec = Spec(ArraySpec((8, 8, 1), low=0.0, high=16.0), class_labels(10))

    def __init__(self, split: Literal["train", "test"]):
        import sklearn.datasets  # takes seconds, and reading a config imports this module

        images, labels = sklearn.datasets.load_digits(return_X_y=True)
        # The images are ordered by writer. A fixed shuffle gives both splits the same writers.
        order = np.random.RandomState(0).permutation(len(images))
        order = order[:TRAIN_SIZE] if split == "train" else order[TRAIN_SIZE:]
        self.images = (images[order].reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
        self.labels = labels[order].astype(np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.images[index], "cond": {"label": self.labels[index]}}


def make(split: Literal["train", "test"] = "train") -> Digits:
    """Loads the digits.

    Args:
      split: `train` (1,500 images) or `test` (the other 297).
    """
    return Digits(split)
