"""Sets of points in the plane, some with an exact density, for experiments that take seconds."""

from typing import Any, Literal

import numpy as np
from scipy.special import logsumexp

from diffusion.core import checks
from diffusion.core.types import ArraySpec, InputError, Spec, class_labels
from diffusion.process.analytic import Mixture

CELLS = 4  # cells along each side of the checkerboard

_ANGLES = 2 * np.pi * np.arange(8) / 8
_RING = np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], axis=1)
MIXTURES = {
    "gaussian": Mixture(means=[[0.25, -0.25]], stds=[0.5], weights=[1.0]),
    "mixture": Mixture(means=0.8 * _RING, stds=np.full(8, 0.1), weights=np.full(8, 1 / 8)),
}


class Toy:
    """Points `[2]`. Those of the kind `mixture` have their component as `label` if labels are requested.

    Attributes:
      points: `[N, 2]` float32.
      labels: `[N]` int32, or None.
      distribution: The `Mixture` that the points are drawn from; None for kinds that are not a mixture.
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
        self.spec = Spec(ArraySpec((2,), "points", low=-1.0, high=1.0), class_labels(num_classes))

    def __len__(self) -> int:
        return len(self.points)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": self.points[index], "cond": {} if self.labels is None else {"label": self.labels[index]}}

    def log_density(self, x: np.ndarray) -> np.ndarray:
        """Returns the exact log-density at `x [N, 2]` in nats, `[N]` float64; -inf outside the checkerboard's cells.

        Raises:
          InputError: The kind is `moons` or `spiral`, whose density has no closed form.
        """
        x = np.asarray(x, np.float64)
        if self.distribution:
            # NumPy computes in float64 whatever the settings of JAX.
            means, variances = self.distribution.means, self.distribution.stds**2
            squares = ((x[:, None] - means) ** 2).sum(axis=-1)
            return logsumexp(
                -squares / (2 * variances) - np.log(2 * np.pi * variances), axis=1, b=self.distribution.weights
            )
        if self.kind != "checkerboard":
            problem = "must be gaussian, mixture or checkerboard to have an exact density"
            raise InputError("kind", f"{problem}, got {self.kind}")
        cell = np.floor((x + 1) * CELLS / 2)
        inside = ((cell >= 0) & (cell < CELLS)).all(axis=1) & (cell.sum(axis=1) % 2 == 0)
        # The cells cover half of the square's area of 4.
        return np.where(inside, -np.log(2.0), -np.inf)


def make(
    kind: Literal["gaussian", "mixture", "checkerboard", "moons", "spiral"] = "mixture",
    size: int = 50_000,
    split: Literal["train", "test"] = "train",
    seed: int = 0,
    labels: bool = True,
) -> Toy:
    """Draws points near [-1, 1]^2, which need no scaling.

    Args:
      kind: One of the following, where "std" is the standard deviation of each coordinate of the points. `gaussian`:
        mean (0.25, -0.25); std 0.5. `mixture`: 8 labelled Gaussians with a standard deviation of 0.1, equally likely,
        on a circle of radius 0.8; std 0.57. `checkerboard`: uniform on 8 of the 4 x 4 cells of [-1, 1]^2; std 0.58.
        `moons`: two half circles facing each other, with noise of standard deviation 0.03; std 0.58 and 0.33. `spiral`:
        one arm with one and a half turns, with noise of standard deviation 0.02; std 0.51 and 0.45.
      size: Number of points.
      split: `train` or `test`, independent draws.
      seed: Seed of the draws, at least 0.
      labels: Whether the components of `mixture` are given as labels; without them, there is no condition.
    """
    checks.at_least(1, size=size)
    checks.at_most(10**8, size, "size")
    checks.at_least(0, seed=seed)
    return Toy(kind, size, labels, np.random.default_rng([seed, int(split == "test")]))


def _mixture(distribution: Mixture, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    component = rng.choice(len(distribution.weights), size, p=distribution.weights)
    noise = rng.normal(size=(size, 2)) * distribution.stds[component, None]
    return distribution.means[component] + noise, component


def _checkerboard(size: int, rng: np.random.Generator) -> np.ndarray:
    column = rng.integers(CELLS, size=size)
    row = 2 * rng.integers(CELLS // 2, size=size) + column % 2
    # Positions in a cell are multiples of 2^-20, which float32 represents exactly, so none is rounded to the next cell.
    position = rng.integers(1 << 20, size=(size, 2)) / (1 << 20)
    return (np.stack([column, row], axis=1) + position) * 2 / CELLS - 1


def _moons(size: int, rng: np.random.Generator) -> np.ndarray:
    angle = np.pi * rng.random(size)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    # The lower moon is the upper one rotated by 180 degrees about the point (1/2, 1/4), which becomes the origin here.
    points = (upper - [0.5, 0.25]) * rng.choice([-1, 1], size=(size, 1))
    return points / 1.5 + 0.03 * rng.normal(size=(size, 2))


def _spiral(size: int, rng: np.random.Generator) -> np.ndarray:
    radius = np.sqrt(rng.random((size, 1)))
    angle = 3 * np.pi * radius
    return radius * np.concatenate([np.cos(angle), np.sin(angle)], axis=1) + 0.02 * rng.normal(size=(size, 2))
