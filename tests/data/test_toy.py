"""Points in the plane: their scale, their exact densities, and their dependence on the seed."""

import jax
import numpy as np
import pytest
import sklearn.datasets

from diffusion.core.build import build
from diffusion.data.pipeline import Batches
from tests.refusals import refused

KINDS = ("gaussian", "mixture", "checkerboard", "moons", "spiral")
EXACT = ("gaussian", "mixture", "checkerboard")


def toy(kind, size=4000, **keywords):
    return build("data", {"name": "toy", "kind": kind, "size": size, **keywords})


def grid(low, high, cells):
    """Returns the centers of the cells of a square, `[cells^2, 2]`, and the area of a cell."""
    middles = low + (high - low) * (np.arange(cells) + 0.5) / cells
    return np.stack(np.meshgrid(middles, middles, indexing="ij"), axis=-1).reshape(-1, 2), ((high - low) / cells) ** 2


@pytest.mark.parametrize("kind", KINDS)
def test_examples(kind):
    source = toy(kind, size=100)
    assert len(source) == 100 and source.spec.shape == (2,)
    assert source.spec.num_classes == (8 if kind == "mixture" else 0)
    example = source[7]
    assert example["x"].shape == (2,) and example["x"].dtype == np.float32
    assert set(example["cond"]) == ({"label"} if kind == "mixture" else set())
    batch = next(Batches(source, batch_size=10, seed=0))
    assert batch["x"].shape == (10, 2) and set(batch["cond"]) == set(example["cond"])


@pytest.mark.parametrize(
    ("kind", "std"),
    [
        ("gaussian", (0.5, 0.5)),
        ("mixture", (0.57, 0.57)),
        ("checkerboard", (0.58, 0.58)),
        ("moons", (0.58, 0.33)),
        ("spiral", (0.51, 0.45)),
    ],
)
def test_scale(kind, std):
    """Checks the standard deviations stated in the docstring of `make`."""
    np.testing.assert_allclose(toy(kind, size=20_000).points.std(axis=0), std, atol=0.015)


def test_labels_are_optional():
    source = build("data", {"name": "toy", "kind": "mixture", "size": 10, "labels": False})
    assert source.spec.num_classes == 0 and source[0]["cond"] == {}


def test_labels_are_the_components():
    source = toy("mixture")
    assert source.labels.dtype == np.int32 and set(source.labels) == set(range(8))
    distance = np.linalg.norm(source.points - source.distribution.means[source.labels], axis=1)
    # The distance has a Rayleigh distribution of scale 0.1, whose mean is 0.125; neighbouring means are 0.61 apart.
    assert abs(distance.mean() - 0.125) < 0.005 and distance.max() < 0.6


@pytest.mark.parametrize("kind", EXACT)
def test_density_integrates_to_one(kind):
    points, area = grid(-4, 4, 800)
    log_density = toy(kind, size=1).log_density(points)
    assert log_density.shape == (800 * 800,) and log_density.dtype == np.float64
    np.testing.assert_allclose(np.exp(log_density).sum() * area, 1, rtol=1e-9)


@pytest.mark.parametrize("kind", EXACT)
def test_points_are_drawn_from_the_density(kind):
    """Checks the chi-square statistic of the counts in a grid of squares against the integrals of the density."""
    size, squares, fine = 20_000, 20, 10
    low, high = (-2.0, 2.0) if kind == "gaussian" else (-1.2, 1.2)
    source = toy(kind, size)
    if kind == "checkerboard":
        low, high = -1.25, 1.25  # each cell of the fine grid then lies inside a cell of the board
    points, area = grid(low, high, squares * fine)
    mass = np.exp(source.log_density(points)).reshape(squares, fine, squares, fine).sum(axis=(1, 3)) * area
    counts, _, _ = np.histogram2d(*source.points.T, bins=squares, range=[[low, high]] * 2)
    assert counts[mass == 0].sum() == 0
    used = size * mass > 10
    chi_square, freedom = ((counts - size * mass)[used] ** 2 / (size * mass)[used]).sum(), used.sum()
    assert used.sum() > 50 and abs(chi_square - freedom) < 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("kind", EXACT)
def test_the_mean_of_minus_log_density_is_the_entropy(kind):
    """Compares the mean over points with the integral on a grid."""
    source = toy(kind, size=20_000)
    points, area = grid(-4, 4, 800)
    log_density = source.log_density(points)
    entropy = -np.sum(np.exp(log_density) * np.where(log_density > -700, log_density, 0)) * area
    surprise = -source.log_density(source.points)
    assert np.isfinite(surprise).all()
    assert abs(surprise.mean() - entropy) <= 4 * surprise.std() / len(source) ** 0.5 + 1e-9


def test_checkerboard_is_empty_outside_its_cells():
    source = toy("checkerboard")
    inside = [[-0.9, -0.9], [-0.9, 0.1], [0.9, 0.9], [-0.4, -0.4], [-0.5, -0.5]]
    outside = [[-0.9, -0.4], [0.9, -0.9], [1.1, 1.1], [-1.1, -1.1], [0.1, 1.6]]
    np.testing.assert_allclose(source.log_density(inside), -np.log(2))
    np.testing.assert_array_equal(source.log_density(outside), -np.inf)


def test_density_is_float64_without_changing_the_settings_of_jax():
    x = np.array([[0.8 + 1e-9, 0.0]])
    source = toy("mixture")
    assert source.log_density(x) != source.log_density(x + 1e-9)
    assert not jax.config.jax_enable_x64


@pytest.mark.parametrize(("kind", "noise"), [("moons", 0.03), ("spiral", 0.02)])
def test_curves(kind, noise):
    """Checks that the points deviate from the curve by the noise alone, and that they cover all of it."""
    if kind == "moons":
        curve = (sklearn.datasets.make_moons(1000)[0] - [0.5, 0.25]) / 1.5
    else:
        radius = np.linspace(0, 1, 1000)
        curve = np.stack([radius * np.cos(3 * np.pi * radius), radius * np.sin(3 * np.pi * radius)], axis=1)
    points = toy(kind).points
    distance = np.linalg.norm(points[:, None] - curve, axis=2)
    np.testing.assert_allclose(np.sqrt((distance.min(axis=1) ** 2).mean()), noise, rtol=0.05)
    assert distance.min(axis=1).max() < 5 * noise and distance.min(axis=0).max() < 3 * noise


@pytest.mark.parametrize("kind", ["moons", "spiral"])
def test_kinds_without_a_density(kind):
    source = toy(kind)
    assert source.distribution is None
    with refused("kind"):
        source.log_density(np.zeros((1, 2)))


@pytest.mark.parametrize("kind", KINDS)
def test_points_depend_on_seed_and_split_alone(kind):
    first, again = toy(kind, seed=3), toy(kind, seed=3)
    np.testing.assert_array_equal(first.points, again.points)
    others = [toy(kind, seed=4), toy(kind, seed=3, split="test")]
    seen = {point.tobytes() for point in first.points}
    for other in others:
        # The checkerboard has 2^40 distinct positions per cell, and the other kinds have more.
        assert not any(point.tobytes() in seen for point in other.points)


@pytest.mark.parametrize(
    ("keywords", "field"), [({"size": 0}, "size"), ({"seed": -1}, "seed"), ({"kind": "rings"}, "kind"),
                            ({"split": "valid"}, "split")]
)  # fmt: skip
def test_bad_options(keywords, field):
    with refused(f"data.{field}"):
        build("data", {"name": "toy", "size": 10, **keywords})
