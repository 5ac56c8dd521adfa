"""Builds the points of a sweep. A point is a dict of dotted config overrides.

    from launch import vary

    def sweep():
        return vary.product(
            vary.over("config", ["configs/digits.py", "configs/digits_flow.py"]),
            vary.over("optimizer.learning_rate", [1e-3, 2e-3]),
        )

A key is a config field without the leading `config.`. Two keys are special: `config` selects another config file and
`name` sets the name of the run.
"""

import builtins
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import Any

from diffusion.core.types import InputError

Overrides = Mapping[str, Any]
Distribution = Callable[[Random], Any]


def over(key: str, values: Iterable[Any]) -> list[Overrides]:
    """Returns one point for each value of a single field."""
    return [{key: value} for value in values]


def product(*parts: Iterable[Overrides]) -> list[Overrides]:
    """Returns every combination of the points of all parts. The last part varies fastest."""
    return [_merged(points) for points in itertools.product(*parts)]


def zip(*parts: Iterable[Overrides]) -> list[Overrides]:
    """Combines the first points of all parts, then the second points, and so on.

    Raises:
      InputError: The parts have different lengths.
    """
    parts = [list(part) for part in parts]
    if len({len(part) for part in parts}) > 1:
        lengths = ", ".join(map(str, map(len, parts)))
        raise InputError("vary.zip", f"the parts must have the same length, got {lengths}")
    return [_merged(points) for points in builtins.zip(*parts, strict=True)]


def chain(*parts: Iterable[Overrides]) -> list[Overrides]:
    """Returns the points of the first part, then those of the second part, and so on."""
    return list(itertools.chain(*parts))


def random(num: int, seed: int, **distributions: Distribution) -> list[Overrides]:
    """Returns `num` random points, which depend only on the seed. A larger `num` appends further points.

    Args:
      num: Number of points.
      seed: Seed of the random numbers.
      **distributions: A distribution per field, as in `**{"optimizer.learning_rate": vary.log_uniform(1e-4, 1e-2)}`.
    """
    # Each field has a separate random stream, so adding a field does not change the values of the others.
    streams = {key: Random(f"{seed} {key}") for key in distributions}
    return [{key: draw(streams[key]) for key, draw in distributions.items()} for _ in range(num)]


def uniform(low: float, high: float) -> Distribution:
    """Returns the uniform distribution on [low, high]."""
    return lambda random: random.uniform(low, high)


def log_uniform(low: float, high: float) -> Distribution:
    """Returns the distribution on [low, high] whose logarithm is uniform. Requires 0 < low <= high."""
    if not 0 < low <= high:
        raise InputError("vary.log_uniform", f"must have 0 < low <= high, got low={low} and high={high}")
    # exp(log(x)) may differ from x in the last bit, hence the clipping.
    return lambda random: min(max(math.exp(random.uniform(math.log(low), math.log(high))), low), high)


def choice(*values: Any) -> Distribution:
    """Returns the uniform distribution over the given values."""
    return lambda random: random.choice(values)


def _merged(points: Iterable[Overrides]) -> Overrides:
    merged: dict[str, Any] = {}
    for point in points:
        for key in point:
            if key in merged:
                raise InputError(key, "is varied by two parts of a product or zip")
        merged.update(point)
    return merged
