"""The points of a sweep: reads them from the sweep file, names them and validates them with training's own parser."""

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
from diffusion.pipelines.build_training import build_training, check_training, training
from diffusion.pipelines.config import check_config
from experiments import cli
from launch.jobs import check_name

READABLE_LENGTH, HASH_LENGTH = 60, 8  # characters of a run's name that list its overrides, and of the hash after them
CONFIG, NAME = "config", "name"  # keys of a point that are not config fields


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """One point of a sweep with its resolved config.

    Attributes:
      name: Name of the run and of its folder. It depends only on the overrides.
      overrides: The overrides as the sweep file lists them.
      flags: The `--config=...` and `--config.a.b=...` flags of its command.
      config: The resolved config.
    """

    name: str
    overrides: Mapping[str, Any]
    flags: tuple[str, ...]
    config: Mapping[str, Any]


def read(sweep: str) -> list[dict[str, Any]]:
    """Returns the points that `sweep()` in a file yields, or `sweep_OTHER()` for `FILE:OTHER`.

    Raises:
      InputError: The file or function does not exist, raises an exception or yields no valid points.
    """
    path, _, other = sweep.partition(":")
    if not os.path.isfile(path):
        available = ", ".join(sorted(glob("configs/sweeps/*.py")))
        raise InputError("--sweep", f"file {path!r} does not exist; available files: {available}")
    function = f"sweep_{other}" if other else "sweep"
    try:
        module = runpy.run_path(path)
        if function not in module:
            available = ", ".join(name for name in module if re.fullmatch("sweep(_.+)?", name)) or "none"
            raise InputError("--sweep", f"{path} does not define {function}(); available functions: {available}")
        points = list(module[function]())
    except InputError:
        raise
    except Exception as error:  # the sweep file is arbitrary code
        raise InputError("--sweep", f"{sweep} raised {type(error).__name__}: {error}") from error
    if not points:
        raise InputError("--sweep", f"{sweep} yields no points")
    for index, point in enumerate(points):
        if not isinstance(point, Mapping) or not all(isinstance(key, str) for key in point):
            raise InputError("--sweep", f"point {index} must be a dict of dotted config fields, got {point!r}")
        try:
            json.dumps(point)
        except (TypeError, ValueError):
            raise InputError("--sweep", f"point {index} has a value that a config cannot hold: {point!r}") from None
    return [dict(point) for point in points]


def name_points(points: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Returns the points by name. A name depends only on the overrides.

    Raises:
      InputError: A name is invalid, or two points have the same name.
    """
    by_name: dict[str, Mapping[str, Any]] = {}
    for index, overrides in enumerate(points):
        name = check_name(str(overrides[NAME]) if NAME in overrides else _name(overrides), "--sweep")
        if name in by_name:
            raise InputError("--sweep", f"points {list(by_name).index(name)} and {index} have the same name, {name}")
        by_name[name] = overrides
    return by_name


def resolve(points: Sequence[Mapping[str, Any]], config: str, base: Mapping[str, Any]) -> list[SweepPoint]:
    """Names the points and resolves their configs.

    Args:
      points: Points as `read` returns them.
      config: Config file of the points that do not select another one.
      base: Overrides of all points. Those of a point take precedence.

    Raises:
      InputError: A field is unknown, a value has the wrong type, or two points are the same.
    """
    resolved = []
    for name, overrides in name_points(points).items():
        fields = {**base, **{key: value for key, value in overrides.items() if key not in (CONFIG, NAME)}}
        flags = (f"--config={overrides.get(CONFIG, config)}",
                 *(f"--config.{key}={_text(value)}" for key, value in fields.items()))  # fmt: skip
        try:
            resolved.append(SweepPoint(name, overrides, flags, cli.config_of(flags)))
        except InputError as error:
            raise _in_point(name, error) from error
    return resolved


def check(points: Iterable[SweepPoint], workdir: str, *, data_here: bool) -> None:
    """Validates each config as `train --check` does, except for the mesh: the runs may use other devices.

    Args:
      points: The points to validate.
      workdir: Folder of the sweep.
      data_here: Whether the data is available on this machine. Without it the parts that depend on the data, such as
        the network, are not built.

    Raises:
      InputError: Training would reject a config; the error names the point.
    """
    for point in points:
        config = {**point.config, "mesh": {}}
        try:
            if data_here:
                folder = os.path.join(workdir, point.name)
                check_training(build_training(config, folder), folder)
            else:
                check_config(config)
                training(config)
        except InputError as error:
            raise _in_point(point.name, error) from error


def _in_point(name: str, error: InputError) -> InputError:
    return InputError("--sweep", f"point {name}: {error}")


def _name(overrides: Mapping[str, Any]) -> str:
    listed = ",".join(f"{key.rpartition('.')[2]}={_short(key, value)}" for key, value in overrides.items())
    readable = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", listed).lstrip(".-")[:READABLE_LENGTH] or "point"
    digest = hashlib.sha256(json.dumps(overrides, sort_keys=True).encode()).hexdigest()
    return f"{readable}-{digest[:HASH_LENGTH]}"


def _short(key: str, value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "+".join(map(str, value))
    return os.path.basename(value).removesuffix(".py") if key == CONFIG else _text(value)


def _text(value: Any) -> str:
    """Formats a value as it appears in a flag."""
    return value if isinstance(value, str) else repr(tuple(value) if isinstance(value, list) else value)
