"""The points of a sweep: read from its file, named, and held against the parser that training has."""

import dataclasses
import hashlib
import json
import os
import re
import runpy
from collections.abc import Iterable, Mapping, Sequence
from glob import glob
from typing import Any

from diffusion.core.types import InputError
from diffusion.pipelines.build_training import prepared, traced, training
from diffusion.pipelines.config import check_sections
from experiments import cli
from launch.jobs import check_name

NAMED, HASH = 60, 8  # characters of a name that tell what is overridden, and that tell it from all others
CONFIG, NAME = "config", "name"  # keys of a point that are no fields of the config


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      name: of its folder; follows from what is overridden alone.
      overrides: as the sweep has them.
      flags: `--config=...` and all `--config.a.b=...` of its command.
      config: what they come to.
    """

    name: str
    overrides: Mapping[str, Any]
    flags: tuple[str, ...]
    config: Mapping[str, Any]


def read(sweep: str) -> list[dict[str, Any]]:
    """What `sweep()` of a file yields, or `sweep_OTHER()` for `FILE:OTHER`.

    Raises:
      InputError: there is no such file or function, it raises, or yields no points.
    """
    path, _, other = sweep.partition(":")
    if not os.path.isfile(path):
        raise InputError("--sweep", f"no file {path!r}; there are: {', '.join(sorted(glob('configs/sweeps/*.py')))}")
    wanted = f"sweep_{other}" if other else "sweep"
    try:
        found = runpy.run_path(path)
        if wanted not in found:
            there = ", ".join(name for name in found if re.fullmatch("sweep(_.+)?", name)) or "none"
            raise InputError("--sweep", f"{path} has no {wanted}(); there are: {there}")
        points = list(found[wanted]())
    except InputError:
        raise
    except Exception as error:  # it may raise anything
        raise InputError("--sweep", f"{sweep} raised {type(error).__name__}: {error}") from error
    if not points:
        raise InputError("--sweep", f"{sweep} yields nothing")
    for number, point in enumerate(points):
        if not isinstance(point, Mapping) or not all(isinstance(key, str) for key in point):
            raise InputError("--sweep", f"point {number} must be a dict of dotted fields, got {point!r}")
        try:
            json.dumps(point)
        except (TypeError, ValueError):
            raise InputError("--sweep", f"point {number} holds what no config does: {point!r}") from None
    return [dict(point) for point in points]


def named(found: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Each point by its name, which follows from what it overrides alone. Raises InputError if two are one."""
    points: dict[str, Mapping[str, Any]] = {}
    for number, overrides in enumerate(found):
        name = check_name(str(overrides[NAME]) if NAME in overrides else _name(overrides), "--sweep")
        if name in points:
            raise InputError("--sweep", f"points {list(points).index(name)} and {number} are the same: {name}")
        points[name] = overrides
    return points


def resolved(found: Sequence[Mapping[str, Any]], config: str, base: Mapping[str, Any]) -> list[Point]:
    """Named points with their configs.

    Args:
      found: as `read` returns them.
      config: the config file of those that name no other.
      base: overrides of all, which a point's own come after.

    Raises:
      InputError: an unknown field or a value of another type; two points that are one.
    """
    points = []
    for name, overrides in named(found).items():
        fields = {**base, **{key: value for key, value in overrides.items() if key not in (CONFIG, NAME)}}
        given = (f"--config={overrides.get(CONFIG, config)}",
                 *(f"--config.{key}={_text(value)}" for key, value in fields.items()))  # fmt: skip
        try:
            points.append(Point(name, overrides, given, cli.config_of(given)))
        except InputError as error:
            raise _at(name, error) from error
    return points


def check(points: Iterable[Point], workdir: str, *, data_here: bool) -> None:
    """Holds each config against its parts as `train --check` does, the mesh aside: the devices may be elsewhere.

    Args:
      data_here: whether the data are on this machine, and with them what the network looks like.

    Raises:
      InputError: naming the point, where training would refuse it.
    """
    for point in points:
        config = {**point.config, "mesh": {}}
        try:
            if data_here:
                traced(prepared(config, os.path.join(workdir, point.name)))
            else:
                check_sections(config)
                training(config)
        except InputError as error:
            raise _at(point.name, error) from error


def _at(name: str, error: InputError) -> InputError:
    return InputError("--sweep", f"point {name}: {error}")


def _name(overrides: Mapping[str, Any]) -> str:
    told = ",".join(f"{key.rpartition('.')[2]}={_short(key, value)}" for key, value in overrides.items())
    readable = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", told).lstrip(".-")[:NAMED] or "point"
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()
    return f"{readable}-{digest[:HASH]}"


def _short(key: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return os.path.basename(value).removesuffix(".py") if key == CONFIG else _text(value)


def _text(value: Any) -> str:
    """A value as a flag has it."""
    return value if isinstance(value, str) else repr(tuple(value) if isinstance(value, list) else value)
