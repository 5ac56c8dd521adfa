"""A sweep over sampling: one checkpoint, read once by one process, and a folder for each point as if it were a run."""

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.core import files
from launch import locks, report, results


def commands(checkpoint: str, workdir: str, rest: Sequence[str]) -> list[tuple[str, ...]]:
    """What draws all points, and measures them, after `python -m`."""
    return [("experiments.sample", f"--workdir={checkpoint}", f"--sweep=@{_points(workdir)}", f"--out={workdir}",
             "--metrics", *rest)]  # fmt: skip


def describe(workdir: str, found: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Writes what the sweep is.

    Args:
      found: the choices of each point by its name.
      settings: of all.
    """
    files.make_folder(workdir, "--workdir")
    with files.replace(_points(workdir)) as file:
        json.dump([{key: value for key, value in point.items() if key != "name"} for point in found.values()], file)
    told = [{"name": name, "overrides": point} for name, point in found.items()]
    with files.replace(os.path.join(workdir, results.SWEEP)) as file:
        json.dump({**settings, "launcher": "local", "points": told}, file, indent=2)


def undo(workdir: str) -> None:
    """Takes away what a sweep has written that was refused before anything was drawn, and its folder."""
    written = {results.SWEEP, os.path.basename(_points(workdir)), locks.NAME}
    if set(os.listdir(workdir)) <= written:
        shutil.rmtree(workdir)


def collect(workdir: str, points: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Lays out what was drawn by point, and writes results.csv and results.html; their paths."""
    with open(os.path.join(workdir, "sweep.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, (name, row) in enumerate(zip(points, rows, strict=True), start=1):
        previews = files.make_folder(os.path.join(workdir, name, "previews"), "--workdir")
        shutil.copy(os.path.join(workdir, "sweep", f"{number:04d}.png"), os.path.join(previews, "step_0000000.png"))
        with files.replace(os.path.join(workdir, name, "evaluation.json")) as file:
            told = {key: float(value) for key, value in row.items() if _is_number(value) and key not in points[name]}
            json.dump(told, file)
        with files.replace(os.path.join(workdir, name, "events.jsonl")) as file:
            file.write(json.dumps({"event": "ended", "code": 0, "told": ""}) + "\n")
    found = results.read(workdir)
    return results.write_csv(workdir, found), report.write_html(workdir, found)


def _points(workdir: str) -> str:
    return os.path.join(workdir, "points.json")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
