"""What a sweep is made of: points, each a dict of dotted overrides of a config, and ways to combine them.

    from launch import vary

    def sweep():
        return vary.product(
            vary.over("config", ["configs/digits.py", "configs/digits_flow.py"]),
            vary.over("optimizer.learning_rate", [1e-3, 2e-3]),
        )

A key is a field of the config without `config.` in front; `config` itself is another config file, `name` a
name for the run.
"""

import builtins
import itertools
import math
from collections.abc import Callable, Iterable, Mapping
from random import Random
from typing import Any

from diffusion.core.types import InputError

Point = Mapping[str, Any]
Law = Callable[[Random], Any]


def over(key: str, values: Iterable[Any]) -> list[Point]:
    """A point for each value of one field."""
    return [{key: value} for value in values]


def product(*parts: Iterable[Point]) -> list[Point]:
    """Every combination of points of the parts, those of the last part fastest."""
    return [_merged(points) for points in itertools.product(*parts)]


def zip(*parts: Iterable[Point]) -> list[Point]:
    """The first points of all parts together, then the second ones. Raises InputError if the parts are not as long."""
    parts = [list(part) for part in parts]
    if len({len(part) for part in parts}) > 1:
        raise InputError("vary.zip", f"the parts must be of one length, got {', '.join(map(str, map(len, parts)))}")
    return [_merged(points) for points in builtins.zip(*parts, strict=True)]


def chain(*parts: Iterable[Point]) -> list[Point]:
    """The points of the first part, then those of the second, and so on."""
    return list(itertools.chain(*parts))


def random(num: int, seed: int, **laws: Law) -> list[Point]:
    """`num` points drawn at random, the same for a seed; the first ones do not depend on `num`.

    Args:
      laws: by field, as `**{"optimizer.learning_rate": vary.log_uniform(1e-4, 1e-2)}`.
    """
    # Each field has numbers of its own: another one beside it changes none of them.
    streams = {key: Random(f"{seed} {key}") for key in laws}
    return [{key: law(streams[key]) for key, law in laws.items()} for _ in range(num)]


def uniform(low: float, high: float) -> Law:
    return lambda random: random.uniform(low, high)


def log_uniform(low: float, high: float) -> Law:
    """Uniform in the logarithm; `low` and `high` above 0."""
    if not 0 < low <= high:
        raise InputError("vary.log_uniform", f"wants 0 < low <= high, got {low} and {high}")
    # Clipped: exp(log(x)) may be next to x.
    return lambda random: min(max(math.exp(random.uniform(math.log(low), math.log(high))), low), high)


def choice(*values: Any) -> Law:
    return lambda random: random.choice(values)


def _merged(points: Iterable[Point]) -> Point:
    found: dict[str, Any] = {}
    for point in points:
        for key in point:
            if key in found:
                raise InputError(key, "is varied by two parts of a product or zip")
        found.update(point)
    return found
