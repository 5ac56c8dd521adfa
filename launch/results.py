"""Reads the state and results of a sweep's runs from their folders.

A sweep's folder contains `sweep.json`, which lists the points in order, and one folder per run, named after its point.
Training writes `metrics.jsonl`, `goodput.jsonl` and `previews/`, evaluation writes `evaluation.json`, and the launcher
writes `events.jsonl`. Files that do not exist yet, and lines that are only half-written, are skipped.
"""

import csv
import dataclasses
import functools
import json
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from diffusion.core import files, locks
from diffusion.core.types import InputError
from diffusion.training.resilience.preemption import PREEMPTED
from experiments.cli import BAD_INPUT, DIVERGED

SWEEP = "sweep.json"
STATE_OF_CODE = {0: "done", BAD_INPUT: "refused", DIVERGED: "diverged", PREEMPTED: "preempted"}
STATES = (
    "running",
    "submitted",
    "quiet",
    "waiting",
    "interrupted",
    "failed",
    "diverged",
    "refused",
    "preempted",
    "done",
)
FINAL_STATES = STATES[STATES.index("interrupted") :]
QUIET_AFTER = 600.0  # seconds without a new log line after which a run on a cluster counts as quiet
NUM_RECENT = 32  # logged steps over which the time per step is averaged


@dataclasses.dataclass(frozen=True)
class ResultRow:
    """The state and results of one run of a sweep.

    Attributes:
      name: Name of the point and of the folder.
      overrides: The point's overrides, from dotted field to JSON value.
      state: One of `STATES`:
        waiting: not started;
        submitted: handed to a cluster but not started there;
        running;
        quiet: running on a cluster, but without a new log line for ten minutes;
        interrupted: started, but neither ended nor running;
        failed, diverged, refused, preempted, done: ended.
      step: The last logged step, or None.
      steps: Number of steps of the whole run, or None if unknown.
      metrics: The last logged metrics and those of the evaluation.
      curve: The metrics of every logged step, including `step`.
      preview: Path of the newest preview image, or None.
      note: Why the run failed, or "".
      seconds: Duration of all starts together.
      starts: Number of starts.
      seconds_left: Estimated time to completion of a running run, or None.
    """

    name: str
    overrides: Mapping[str, Any]
    state: str
    step: int | None = None
    steps: int | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curve: Sequence[Mapping[str, float]] = ()
    preview: str | None = None
    note: str = ""
    seconds: float = 0.0
    starts: int = 0
    seconds_left: float | None = None


def read(workdir: str) -> list[ResultRow]:
    """Returns the runs of a sweep in its order. Raises InputError if the folder does not contain a sweep."""
    sweep = read_sweep(workdir)
    now = time.time()
    local = sweep.get("launcher", "local") == "local"
    return [_read_run(os.path.join(workdir, point["name"]), point, local, now) for point in sweep["points"]]


def read_sweep(workdir: str) -> dict[str, Any]:
    """Returns the content of `sweep.json`. Its `points` have a `name`, which is that of their folder, and `overrides`.

    Raises:
      InputError: The file does not exist or is corrupt.
    """
    path = os.path.join(workdir, SWEEP)
    if not files.is_folder(workdir, "workdir"):
        raise InputError("workdir", f"{workdir} does not exist")
    if not epath.Path(path).exists():
        raise InputError("workdir", f"{workdir} contains no {SWEEP}, which python -m launch.sweep writes")
    sweep = read_json(path)
    points = sweep.get("points") if isinstance(sweep, dict) else None
    if not isinstance(points, list) or not all(
        isinstance(point, dict) and {"name", "overrides"} <= point.keys() for point in points
    ):
        raise InputError("workdir", f"{path} is corrupt: it has no valid list of points")
    return sweep


def write_csv(workdir: str, rows: Sequence[ResultRow]) -> str:
    """Writes `results.csv` and returns its path.

    The columns are name, state, the overrides, step and the metrics. Overrides and metrics are in order of appearance.
    """
    overrides, metrics = all_keys(row.overrides for row in rows), all_keys(row.metrics for row in rows)
    path = os.path.join(workdir, "results.csv")
    with files.writing(path, "workdir"), files.replace(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "state", *overrides, "step", *metrics])
        for row in rows:
            values = [as_text(row.overrides[key]) if key in row.overrides else "" for key in overrides]
            writer.writerow([row.name, row.state, *values, row.step, *(row.metrics.get(key) for key in metrics)])
    return path


def all_keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns the keys of all mappings in order of appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def as_text(value: Any) -> str:
    """Formats the value of an override."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def varied_fields(rows: Sequence[ResultRow]) -> list[str]:
    """Returns the overridden fields whose value is not the same in all rows."""
    absent = object()

    def values(key: str) -> set:
        return {as_text(row.overrides[key]) if key in row.overrides else absent for row in rows}

    return [key for key in all_keys(row.overrides for row in rows) if len(values(key)) > 1]


def short_names(fields: Sequence[str]) -> dict[str, str]:
    """Maps each dotted field to its shortest unique ending, as in `optimizer.learning_rate` to `learning_rate`."""
    short = {}
    for field in fields:
        parts = field.split(".")
        endings = (".".join(parts[start:]) for start in reversed(range(len(parts))))
        short[field] = next((ending for ending in endings if _num_with_ending(ending, fields) == 1), field)
    return short


def labels(rows: Sequence[ResultRow]) -> list[str]:
    """Returns a short label per row: its varied overrides if they identify every row, else its name."""
    short = short_names(varied_fields(rows))
    found = [
        " ".join(f"{short[key]}={as_text(row.overrides[key])}" for key in short if key in row.overrides) for row in rows
    ]
    return found if all(found) and len(set(found)) == len(found) else [row.name for row in rows]


def counts(rows: Sequence[ResultRow]) -> str:
    """Returns the number of runs per state, as in `3 done, 1 running`."""
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in reversed(STATES) if state in states) or "no runs"


def _num_with_ending(ending: str, fields: Sequence[str]) -> int:
    return sum(f".{field}".endswith(f".{ending}") for field in fields)


def _read_run(folder: str, point: Mapping[str, Any], local: bool, now: float) -> ResultRow:
    curve, last_change = _lines(os.path.join(folder, "metrics.jsonl"), _metrics_of)
    events, _ = _lines(os.path.join(folder, "events.jsonl"), dict)
    if not local:  # the submitting and the running process append independently
        events = sorted(events, key=lambda event: event["time"])
    step = int(curve[-1]["step"]) if curve else None
    steps = point.get("steps")
    state = _state(folder, events, local, step, steps, last_change, now)
    metrics = {name: value for name, value in (curve[-1] if curve else {}).items() if name != "step"}
    for name, value in _evaluation(os.path.join(folder, "evaluation.json")):
        metrics[f"evaluation.{name}" if name in metrics else name] = value
    seconds, starts, per_step = _timing(folder, events, now if state == "running" else last_change)
    seconds_left = None
    if state == "running" and None not in (per_step, step, steps):
        seconds_left = per_step * max(steps - step, 0)
    note = _note(events[-1]) if state in ("failed", "diverged", "refused") else ""
    return ResultRow(
        point["name"], point["overrides"], state, step, steps, metrics, list(curve), _newest_preview(folder), note,
        seconds, starts, seconds_left,
    )  # fmt: skip


def _state(
    folder: str, events: Sequence[dict], local: bool, step: int | None, steps: int | None, last_change: float,
    now: float,
) -> str:  # fmt: skip
    last = events[-1] if events else {"event": None, "time": 0.0}
    if last["event"] == "ended" and last["code"] == 0:
        return "done"
    if local and locks.is_held(folder):
        return "running"
    if last["event"] == "ended":
        return STATE_OF_CODE.get(last["code"], "failed")
    if last["event"] is None and step is None:
        return "waiting"
    if local and last["event"] != "submitted":
        return "interrupted"
    if None not in (step, steps) and step >= steps:
        return "done"
    # Metrics older than the submission are those of an earlier start. File times may be whole seconds.
    if step is None or last_change + 1 < last["time"]:
        return "submitted"
    return "running" if now - last_change < QUIET_AFTER else "quiet"


def _note(ended: Mapping[str, Any]) -> str:
    message = " ".join(ended.get("message", "").split())
    if message:
        return message
    code = ended["code"]
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"ended by {names.get(-code, f'signal {-code}')}"
    return f"exit code {code}"


def _timing(folder: str, events: Sequence[dict], until: float) -> tuple[float, int, float | None]:
    """Returns the seconds of all starts, the number of starts, and the recent seconds per step."""
    ticks, _ = _lines(os.path.join(folder, "goodput.jsonl"), _tick_of)
    recent = [tick for tick in ticks if tick[0] == ticks[-1][0]][1:][-NUM_RECENT:]  # the first line covers startup
    steps = recent[-1][1] - recent[0][1] if recent else 0
    per_step = max(recent[-1][2] - recent[0][2], 0.0) / steps if steps > 0 else None
    if not any(event["event"] == "started" for event in events):  # on a cluster only the run itself records times
        return math.fsum(tick[3] for tick in ticks), len({tick[0] for tick in ticks}), per_step
    seconds, starts, since = 0.0, 0, None
    for event in events:
        if event["event"] == "started":
            starts, since = starts + 1, event["time"]
        elif event["event"] == "ended" and since is not None:
            seconds, since = seconds + max(event["time"] - since, 0.0), None
    return seconds + (max(until - since, 0.0) if since is not None else 0.0), starts, per_step


def _newest_preview(folder: str) -> str | None:
    try:
        found = [
            (re.fullmatch(r"step_(\d+)\.png", path.name), path) for path in epath.Path(folder, "previews").iterdir()
        ]
    except Exception:  # the exceptions depend on the storage backend
        return None
    steps = [(int(match[1]), os.fspath(path)) for match, path in found if match]
    return max(steps)[1] if steps else None


def _evaluation(path: str) -> Iterator[tuple[str, float]]:
    """Yields the numbers of an evaluation with dotted names. `settings` is not part of the results."""

    def flatten(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                if prefix or key != "settings":
                    yield from flatten(f"{prefix}.{key}" if prefix else key, inner)
        elif prefix and _is_number(value):
            yield prefix, value

    yield from flatten("", read_json(path))


def _metrics_of(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in line.items() if _is_number(value)}


def _tick_of(line: Mapping[str, Any]) -> tuple[str, int, float, float]:
    """Returns attempt, step, time and the seconds since the attempt's previous line."""
    return line["attempt"], line["step"], line["time"], math.fsum(line["seconds"].values())


def _lines(path: str, convert: Callable[[Any], Any]) -> tuple[tuple, float]:
    """Returns the complete lines of a JSONL file, parsed and converted, and the time of the last change."""
    try:
        found = epath.Path(path).stat()
    except Exception:  # the exceptions depend on the storage backend
        return (), 0.0
    return _cached_lines(path, convert, found.mtime, found.length), float(found.mtime)


@functools.lru_cache(maxsize=4096)
def _cached_lines(path: str, convert: Callable[[Any], Any], changed: float, length: int) -> tuple:
    """Parses a JSONL file. Thanks to the cache, redrawing a table rereads only the files that have changed."""
    found = (_parse(line) for line in _read_text(path).splitlines() if line.strip())
    return tuple(convert(line) for line in found if line is not None)


def read_json(path: str) -> Any:
    """Returns the content of a JSON file, or None if it does not exist or is only half-written."""
    return _parse(_read_text(path))


def _read_text(path: str) -> str:
    try:
        return epath.Path(path).read_bytes().decode(errors="replace")
    except Exception:  # the exceptions depend on the storage backend
        return ""


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _is_number(value: Any) -> bool:
    """Returns whether a value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
