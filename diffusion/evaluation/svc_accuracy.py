"""The share of samples that a support vector classifier, fitted to the real images, assigns to their class."""

import numpy as np

from diffusion.core import checks
from diffusion.core.types import InputError, Source
from diffusion.evaluation.reference import all_of


class SVCAccuracy:
    """A `SampleMetric`. The classifier is fitted to the training data; its held-out accuracy is also reported."""

    def __init__(self, num: int, guidance: float, gamma: float, C: float, train: Source, held_out: Source):
        from sklearn.svm import SVC  # takes seconds, and reading a config imports this module

        self.num, self.guidance = num, guidance
        x, labels = all_of(train)
        self.classifier = SVC(gamma=gamma, C=C).fit(x, labels)
        self.real = float(self.classifier.score(*all_of(held_out)))

    def __call__(self, x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Returns `svc_accuracy` of samples `x [N, ...]` in [-1, 1] conditioned on `labels [N]`, and `svc_on_real`."""
        return {"svc_accuracy": float(self.classifier.score(x.reshape(len(x), -1), labels)), "svc_on_real": self.real}


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
