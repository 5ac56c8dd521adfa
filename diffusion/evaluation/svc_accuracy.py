"""The share of samples that a support vector classifier, fitted to the real images, assigns to their class."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.core import checks
from diffusion.core.types import InputError, Source
from diffusion.evaluation.reference import all_of


class SVCAccuracy:
    """A `SampleMetric`: `svc_accuracy`, and `svc_on_real`, the classifier's accuracy on the held-out data.

    The classifier is fitted to the training data.
    """

    kind, names = "samples", ("svc_accuracy", "svc_on_real")

    def __init__(self, num: int, guidance: float, gamma: float, C: float, train: Source, held_out: Source):
        from sklearn.svm import SVC  # takes seconds, and reading a config imports this module

        self.num, self.guidance = num, guidance
        x, labels = all_of(train)
        self.classifier = SVC(gamma=gamma, C=C).fit(x, labels)
        self.real = float(self.classifier.score(*all_of(held_out)))

    def init(self) -> np.ndarray:
        """Returns the numbers of recognized samples and of all samples."""
        return np.zeros(2, np.int64)

    def update(self, state: np.ndarray, images: np.ndarray, conditions: Mapping[str, Any]) -> np.ndarray:
        found = self.classifier.predict(images.reshape(len(images), -1))
        return state + np.array([np.sum(found == conditions["label"]), len(images)])

    def result(self, state: np.ndarray) -> dict[str, float]:
        return {"svc_accuracy": float(state[0] / state[1]), "svc_on_real": self.real}


def make(
    train: Source, held_out: Source, num: int = 1000, guidance: float = 1.5, gamma: float = 0.05, C: float = 10.0
) -> SVCAccuracy:
    """Builds the metric.

    Args:
      num: Number of samples.
      guidance: Guidance scale of the samples.
      gamma, C: Parameters of the RBF classifier, on pixels in [-1, 1].
    """
    checks.at_least(1, num=num)
    if not train.spec.num_classes:
        raise InputError("name", "svc_accuracy requires data with classes")
    return SVCAccuracy(num, guidance, gamma, C, train, held_out)
