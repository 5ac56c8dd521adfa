"""How many samples a support vector classifier, fitted on the real images, reads as the class asked for."""

import numpy as np
from sklearn.svm import SVC

from diffusion.core.types import InputError, Source
from diffusion.evaluation.reference import all_of


class SVCAccuracy:
    """The classifier is fitted once, on the training data, and scored on held-out data as a measure of itself."""

    def __init__(self, num: int, guidance: float, gamma: float, C: float, train: Source, held_out: Source):
        self.num, self.guidance = num, guidance
        x, labels = all_of(train)
        self.classifier = SVC(gamma=gamma, C=C).fit(x, labels)
        self.real = float(self.classifier.score(*all_of(held_out)))

    def __call__(self, x: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Args: `x [N, ...]` in [-1, 1] and `labels [N]`, the classes asked for."""
        return {"svc_accuracy": float(self.classifier.score(x.reshape(len(x), -1), labels)), "svc_on_real": self.real}


def make(
    train: Source, held_out: Source, num: int = 1000, guidance: float = 1.5, gamma: float = 0.05, C: float = 10.0
) -> SVCAccuracy:
    """Args: `num` samples at `guidance`; `gamma` and `C` of the RBF classifier on pixels in [-1, 1]."""
    if num < 1:
        raise InputError("num", f"must be at least 1, got {num}")
    if not train.spec.num_classes:
        raise InputError("name", "svc_accuracy needs data with classes")
    return SVCAccuracy(num, guidance, gamma, C, train, held_out)
