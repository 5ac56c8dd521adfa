"""Sets of points in the plane, some with an exact density: experiments of seconds, held to numbers."""

from typing import Any, Literal

import numpy as np
from scipy.special import logsumexp

from diffusion.core.checks import at_most
from diffusion.core.types import InputError, Spec
from diffusion.process.analytic import Mixture

CELLS = 4  # of the checkerboard, along each side

_ANGLES = 2 * np.pi * np.arange(8) / 8
_RING = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
MIXTURES = {
    "gaussian": Mixture(means=[[0.25, -0.25]], stds=[0.5], weights=[1.0]),
    "mixture": Mixture(means=0.8 * _RING, stds=np.full(8, 0.1), weights=np.full(8, 1 / 8)),
}


class Toy:
    """Points `[2]`; those of `mixture` have their component as `label`, if asked for.

    Attributes:
      points: `[N, 2]` float32.
      labels: `[N]` int32, or None.
      distribution: the `Mixture` that the points are drawn from, None for kinds that are not one.
    """

    def __init__(self, kind: str, size: int, labels: bool, rng: np.random.Generator):
        self.kind = kind
        self.distribution = MIXTURES.get(kind)
        self.labels = None
        if self.distribution:
            points, components = _mixture(self.distribution, size, rng)
            if labels and kind == "mixture":
                self.labels = components.astype(np.int32)
        else:
            points = {"checkerboard": _checkerboard, "moons": _moons, "spiral": _spiral}[kind](size, rng)
        self.points = points.astype(np.float32)
        num_classes = 0 if self.labels is None else len(self.distribution.weights)
        self.spec = Spec(shape=(2,), num_classes=num_classes, low=-1.0, high=1.0)

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.points[index], "cond": {} if self.labels is None else {"label": self.labels[index]}}

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """The exact log-density at `x [N, 2]` in nats, `[N]` float64; -inf off the checkerboard's cells.

        Raises:
          InputError: for moons and spiral, which have no closed form.
        """
        x = np.asarray(x, np.float64)
        if self.distribution:
            # In numpy: float64 whatever JAX is set to.
            means, variances = self.distribution.means, self.distribution.stds**2
            squares = ((x[:, None] - means) ** 2).sum(axis=-1)
            return logsumexp(
                -squares / (2 * variances) - np.log(2 * np.pi * variances), axis=1, b=self.distribution.weights
            )
        if self.kind != "checkerboard":
            raise InputError("kind", f"{self.kind} has no exact density; gaussian, mixture and checkerboard have")
        cell = np.floor((x + 1) * CELLS / 2)
        inside = ((cell >= 0) & (cell < CELLS)).all(axis=1) & (cell.sum(axis=1) % 2 == 0)
        # Half of the square's area of 4 is filled.
        return np.where(inside, -np.log(2.0), -np.inf)


def make(
    kind: Literal["gaussian", "mixture", "checkerboard", "moons", "spiral"] = "mixture",
    size: int = 50_000,
    split: Literal["train", "test"] = "train",
    seed: int = 0,
    labels: bool = True,
) -> Toy:
    """Points near [-1, 1]^2, already in the model's units; deviations below are those of each coordinate.

    Args:
      kind: `gaussian` (mean (0.25, -0.25), deviation 0.5), `mixture` (8 Gaussians of deviation 0.1 on a circle of
        radius 0.8, equally likely and labelled; 0.57), `checkerboard` (uniform on 8 of the 4x4 cells of [-1, 1]^2;
        0.58), `moons` (two half circles facing each other, with noise of deviation 0.03; 0.58 and 0.33) or `spiral`
        (one arm of one and a half turns, with noise of deviation 0.02; 0.51 and 0.45).
      size: number of points.
      split: `train` or `test`, independent draws.
      seed: of the draws, at least 0.
      labels: whether a mixture's components are given as labels; without, there is no condition.
    """
    if size < 1:
        raise InputError("size", f"must be at least 1, got {size}")
    at_most(10**8, size, "size")
    if seed < 0:
        raise InputError("seed", f"must be at least 0, got {seed}")
    return Toy(kind, size, labels, np.random.default_rng([seed, int(split == "test")]))


def _mixture(distribution: Mixture, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    component = rng.choice(len(distribution.weights), size, p=distribution.weights)
    noise = rng.normal(size=(size, 2)) * distribution.stds[component, None]
    return distribution.means[component] + noise, component


def _checkerboard(size: int, rng: np.random.Generator) -> np.ndarray:
    column = rng.integers(CELLS, size=size)
    row = 2 * rng.integers(CELLS // 2, size=size) + column % 2
    # Places in a cell are multiples of 2^-20, which float32 holds: none is rounded into the next cell.
    place = rng.integers(1 << 20, size=(size, 2)) / (1 << 20)
    return (np.stack([column, row], axis=1) + place) * 2 / CELLS - 1


def _moons(size: int, rng: np.random.Generator) -> np.ndarray:
    angle = np.pi * rng.random(size)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # The lower moon is the upper one turned half around the point (1/2, 1/4), here the origin.
    points = (upper - [0.5, 0.25]) * rng.choice([-1, 1], size=(size, 1))
    return points / 1.5 + 0.03 * rng.normal(size=(size, 2))


def _spiral(size: int, rng: np.random.Generator) -> np.ndarray:
    radius = np.sqrt(rng.random((size, 1)))
    angle = 3 * np.pi * radius
    return radius * np.concatenate([np.cos(angle), np.sin(angle)], axis=1) + 0.02 * rng.normal(size=(size, 2))
