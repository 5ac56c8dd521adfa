import itertools

import numpy as np
import pytest
from scipy.stats import norm

from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Spec
from diffusion.evaluation.energy_distance import EnergyDistance
from tests.streams import measured


@pytest.fixture(scope="module")
def real(digits):
    return {"train": digits, "held_out": build("data", {"name": "digits", "split": "test"})}


def test_svc_recognizes_real_digits_but_not_noise(real):
    metric = build("evaluation", "svc_accuracy", **real)
    test = real["held_out"]
    values = measured(metric, test.images, test.labels)
    assert values["svc_accuracy"] == values["svc_on_real"] > 0.99
    assert measured(metric, test.images, np.roll(test.labels, 1))["svc_accuracy"] < 0.3
    noise = np.random.default_rng(0).uniform(-1, 1, (200, 8, 8, 1)).astype(np.float32)
    assert measured(metric, noise, np.arange(200) % 10)["svc_accuracy"] < 0.3


class Vectors:
    def __init__(self, x):
        self.x, self.spec = np.asarray(x, np.float32), Spec(ArraySpec(np.shape(x)[1:]))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "cond": {}}


def test_energy_distance_of_gaussians():
    """In one dimension, 2 E|X - Y| - E|X - X'| - E|Y - Y'| of N(0, 1) and N(d, 1) has a closed form.

    The ratio is that of N(d, 1) and N(2d, 1) to N(0, 1).
    """
    rng, d = np.random.default_rng(0), 1.0
    held_out, train, x = (rng.normal(0, 1, (3000, 1)) for _ in range(3))
    # The sample means would cause most of the error.
    held_out, train, x = held_out - held_out.mean(), train - train.mean() + d, x - x.mean() + 2 * d

    def closed_form(d):
        spread = 2**0.5  # the standard deviation of a difference
        cross = spread * 2 * norm.pdf(d / spread) + d * (1 - 2 * norm.cdf(-d / spread))
        return 2 * cross - 4 / np.pi**0.5

    ratio = measured(EnergyDistance(0, 1.0, Vectors(train), Vectors(held_out)), x)["energy_distance_ratio"]
    assert abs(ratio - closed_form(2 * d) / closed_form(d)) < 0.05


def test_the_mean_energy_distance_ratio_of_real_samples_is_one():
    """For every number of samples, over all subsets of the training set."""
    rng = np.random.default_rng(0)
    train, held_out = rng.normal(size=(7, 3)), rng.normal(size=(5, 3)) + 0.3
    metric = EnergyDistance(0, 1.0, Vectors(train), Vectors(held_out))
    for num in (1, 2, 3, 7):
        subsets = map(list, itertools.combinations(range(7), num))
        ratios = [
            measured(metric, train[rows].astype(np.float32), batch_size=2)["energy_distance_ratio"] for rows in subsets
        ]
        assert abs(np.mean(ratios) - 1) < 1e-6, num


def test_energy_distance_ratio(real):
    metric = build("evaluation", "energy_distance", **real)
    train = real["train"].images
    assert abs(measured(metric, train)["energy_distance_ratio"] - 1) < 1e-9
    rows = np.random.default_rng(0).permutation(len(train))
    few = [measured(metric, train[rows[start : start + 100]])["energy_distance_ratio"] for start in range(0, 1500, 100)]
    assert abs(np.mean(few) - 1) < 0.02
    assert measured(metric, train[:100].repeat(10, 0))["energy_distance_ratio"] > 1.5  # few distinct samples
    assert measured(metric, 0.5 * train)["energy_distance_ratio"] > 5  # low contrast
