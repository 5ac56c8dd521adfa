import numpy as np
import pytest
from scipy.stats import norm

from diffusion.core.build import build
from diffusion.evaluation.energy_distance import energy_distance


@pytest.fixture(scope="module")
def real(digits):
    return {"train": digits, "held_out": build("data", {"name": "digits", "split": "test"})}


def test_svc_recognizes_real_digits_but_not_noise(real):
    metric = build("evaluation", "svc_accuracy", **real)
    test = real["held_out"]
    values = metric(test.images, test.labels)
    assert values["svc_accuracy"] == values["svc_on_real"] > 0.99
    assert metric(test.images, np.roll(test.labels, 1))["svc_accuracy"] < 0.3
    noise = np.random.default_rng(0).uniform(-1, 1, (200, 8, 8, 1)).astype(np.float32)
    assert metric(noise, np.arange(200) % 10)["svc_accuracy"] < 0.3


def test_energy_distance_of_gaussians():
    """In one dimension, 2 E|X - Y| - E|X - X'| - E|Y - Y'| of N(0, 1) and N(d, 1) has a closed form."""
    rng, d = np.random.default_rng(0), 1.0
    x, y = rng.normal(0, 1, (4000, 1)), rng.normal(d, 1, (4000, 1))
    x, y = x - x.mean(), y - y.mean() + d  # the sample means would cause most of the error
    spread = 2**0.5  # the standard deviation of a difference
    cross = spread * 2 * norm.pdf(d / spread) + d * (1 - 2 * norm.cdf(-d / spread))
    same = 2 / np.pi**0.5
    assert abs(energy_distance(x, y) - (2 * cross - 2 * same)) < 0.03


def test_energy_distance_ratio(real):
    metric = build("evaluation", "energy_distance", **real)
    train = real["train"].images
    assert abs(metric(train, None)["energy_distance_ratio"] - 1) < 1e-9
    assert metric(train[:100].repeat(10, 0), None)["energy_distance_ratio"] > 1.5  # few distinct samples
    assert metric(0.5 * train, None)["energy_distance_ratio"] > 5  # low contrast
