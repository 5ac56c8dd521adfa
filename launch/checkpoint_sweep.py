"""A sweep over sampling options: one process loads a checkpoint once and draws the samples of all points."""

import csv
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.core import files, locks
from launch import report, results


def commands(checkpoint: str, workdir: str, rest: Sequence[str]) -> list[tuple[str, ...]]:
    """Returns the commands, without `python -m`, that draw and evaluate the samples of all points.

    Args:
      checkpoint: Workdir of the trained model.
      workdir: Folder of the sweep.
      rest: Further flags of `experiments.sample`.
    """
    return [("experiments.sample", f"--workdir={checkpoint}", f"--sweep=@{_points_path(workdir)}", f"--out={workdir}",
             "--metrics", *rest)]  # fmt: skip


def write_description(workdir: str, points: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Writes the points for `experiments.sample`, and `sweep.json`.

    Args:
      workdir: Folder of the sweep.
      points: The sampling options of each point by its name.
      settings: Settings of the whole sweep.
    """
    files.make_folder(workdir, "--workdir")
    listed = [{key: value for key, value in point.items() if key != "name"} for point in points.values()]
    files.write_json(_points_path(workdir), listed)
    listed = [{"name": name, "overrides": point} for name, point in points.items()]
    files.write_json(os.path.join(workdir, results.SWEEP), {**settings, "launcher": "local", "points": listed})


def remove_empty(workdir: str) -> None:
    """Removes the folder of a sweep that was refused before any sample was drawn."""
    description = {results.SWEEP, os.path.basename(_points_path(workdir)), locks.NAME}
    if set(os.listdir(workdir)) <= description:
        shutil.rmtree(workdir)


def write_results(workdir: str, points: Mapping[str, Mapping[str, Any]]) -> tuple[str, str]:
    """Distributes the output of `experiments.sample` to one folder per point, and summarizes it.

    Returns:
      The paths of `results.csv` and `results.html`.
    """
    with open(os.path.join(workdir, "sweep.csv"), encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, (name, row) in enumerate(zip(points, rows, strict=True), start=1):
        previews = files.make_folder(os.path.join(workdir, name, "previews"), "--workdir")
        shutil.copy(os.path.join(workdir, "sweep", f"{number:04d}.png"), os.path.join(previews, "step_0000000.png"))
        numbers = {key: float(value) for key, value in row.items() if _is_number(value) and key not in points[name]}
        files.write_json(os.path.join(workdir, name, "evaluation.json"), numbers)
        with files.replace(os.path.join(workdir, name, "events.jsonl")) as file:
            file.write(json.dumps({"event": "ended", "code": 0, "message": ""}) + "\n")
    found = results.read(workdir)
    return results.write_csv(workdir, found), report.write_html(workdir, found)


def _points_path(workdir: str) -> str:
    return os.path.join(workdir, "points.json")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
