"""What has become of the runs of a sweep: read from their folders, each time anew.

A sweep's folder has `sweep.json`, with the points in order; a run's folder is named after its point. Training writes
`metrics.jsonl`, `goodput.jsonl`, `previews/` and, where it is asked to, `evaluation.json`; what launches it writes
`events.jsonl`. Whatever is missing or damaged there counts as not written yet.
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
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from etils import epath

from diffusion.core import files
from diffusion.core.types import InputError
from diffusion.training.resilience.preemption import STOPPED
from experiments.cli import BAD_INPUT, DIVERGED
from launch import locks

SWEEP = "sweep.json"
CODES = {0: "done", BAD_INPUT: "refused", DIVERGED: "diverged", STOPPED: "preempted"}
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
ENDED = STATES[STATES.index("interrupted") :]
QUIET = 600.0  # seconds without news after which a run on a cluster may have ended
NESTED = 8  # levels of an evaluation that are read
RECENT = 32  # logged steps that tell how long a step takes


@dataclasses.dataclass(frozen=True)
class Row:
    """A run of a sweep.

    Attributes:
      name: of the point, and of the folder.
      overrides: dotted field -> any JSON value.
      state: one of `STATES`: waiting (nothing yet), running, submitted (to a cluster that has not begun), quiet (on a
        cluster, with no news for ten minutes), interrupted (begun, neither ended nor running), failed, diverged,
        refused, preempted, done.
      step: the last logged; None before there is one.
      steps: of the whole run, if they are known.
      metrics: the last logged, and those of the evaluation.
      curve: the logged metrics of every logged step, `step` among them.
      picture: path of the newest preview.
      note: why it failed, or "".
      seconds: of all its starts.
      starts: how many there were.
      left: seconds that a run at work still takes, if that can be told.
    """

    name: str
    overrides: Mapping[str, Any]
    state: str
    step: int | None = None
    steps: int | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    curve: Sequence[Mapping[str, float]] = ()
    picture: str | None = None
    note: str = ""
    seconds: float = 0.0
    starts: int = 0
    left: float | None = None


def read(workdir: str) -> list[Row]:
    """The runs of a sweep, in its order. Raises InputError if the folder is no sweep's."""
    sweep = read_sweep(workdir)
    now = time.time()
    local = sweep.get("launcher", "local") == "local"
    return [_row(os.path.join(workdir, point["name"]), point, local, now) for point in sweep["points"]]


def read_sweep(workdir: str) -> dict[str, Any]:
    """The sweep's own description. Its points have a `name` that leads to a folder within, and `overrides`.

    Raises:
      InputError: it is missing or damaged.
    """
    path = os.path.join(workdir, SWEEP)
    if not files.is_folder(workdir, "workdir"):
        raise InputError("workdir", f"{workdir} does not exist")
    if not epath.Path(path).exists():
        raise InputError("workdir", f"{workdir} has no {SWEEP}; python -m launch.sweep writes it")
    sweep = read_json(path)
    points = sweep.get("points") if isinstance(sweep, dict) else None
    if not isinstance(points, list):
        raise InputError("workdir", f"{path} is damaged: it has no points")
    names = set()
    for number, point in enumerate(points, start=1):
        point = point if isinstance(point, dict) else {}
        name = point.get("name")
        if not isinstance(name, str) or not _is_within(name) or name in names:
            raise InputError("workdir", f"{path} is damaged: point {number} has no name of its own")
        names.add(name)
        if not isinstance(point.setdefault("overrides", {}), dict):
            raise InputError("workdir", f"{path} is damaged: the overrides of point {number} are no mapping")
    return sweep


def write_csv(workdir: str, rows: Sequence[Row]) -> str:
    """Writes `results.csv`, and returns its path. Columns: name, state, the overrides, step, the metrics; each kind in
    order of appearance."""
    overrides, metrics = keys(row.overrides for row in rows), keys(row.metrics for row in rows)
    path = os.path.join(workdir, "results.csv")
    try:
        with files.replace(path) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["name", "state", *overrides, "step", *metrics])
            for row in rows:
                given = [spell(row.overrides[key]) if key in row.overrides else "" for key in overrides]
                writer.writerow([row.name, row.state, *given, row.step, *(row.metrics.get(key) for key in metrics)])
    except OSError as error:
        raise InputError("workdir", f"{path} cannot be written: {error.strerror or error}") from error
    return path


def keys(mappings: Iterator[Mapping[str, Any]]) -> list[str]:
    """All keys, in order of appearance."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))


def spell(value: Any) -> str:
    """An override's value as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def differing(rows: Sequence[Row]) -> list[str]:
    """The overrides that not all rows share."""
    absent = object()

    def values(key: str) -> set:
        return {spell(row.overrides[key]) if key in row.overrides else absent for row in rows}

    return [key for key in keys(row.overrides for row in rows) if len(values(key)) > 1]


def shortened(fields: Sequence[str]) -> dict[str, str]:
    """Each dotted field -> as much of its end as no other has: `optimizer.learning_rate` -> `learning_rate`."""
    short = {}
    for field in fields:
        parts = field.split(".")
        ends = (".".join(parts[start:]) for start in reversed(range(len(parts))))
        short[field] = next((end for end in ends if _ending(end, fields) == 1), field)
    return short


def labels(rows: Sequence[Row]) -> list[str]:
    """What tells the rows apart, in short: the overrides that they do not share; the names if that is not enough."""
    short = shortened(differing(rows))
    found = [
        " ".join(f"{short[key]}={spell(row.overrides[key])}" for key in short if key in row.overrides) for row in rows
    ]
    return found if all(found) and len(set(found)) == len(found) else [row.name for row in rows]


def counts(rows: Sequence[Row]) -> str:
    """`3 done, 1 running`."""
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in reversed(STATES) if state in states) or "no runs"


def _ending(end: str, fields: Sequence[str]) -> int:
    return sum(f".{field}".endswith(f".{end}") for field in fields)


def _row(folder: str, point: Mapping[str, Any], local: bool, now: float) -> Row:
    curve, news = _lines(os.path.join(folder, "metrics.jsonl"), _metrics_of)
    events, _ = _lines(os.path.join(folder, "events.jsonl"), _event_of)
    if not local:  # what submits and what runs write each for itself
        events = sorted(events, key=lambda event: event["time"])
    step = int(curve[-1]["step"]) if curve else None
    steps = point.get("steps")
    steps = int(steps) if _is_number(steps) and steps > 0 else None
    state = _state(folder, events, local, step, steps, news, now)
    metrics = {name: value for name, value in (curve[-1] if curve else {}).items() if name != "step"}
    for name, value in _evaluation(os.path.join(folder, "evaluation.json")):
        metrics[f"evaluation.{name}" if name in metrics else name] = value
    seconds, starts, each = _time_of(folder, events, now if state == "running" else news)
    left = None
    if state == "running" and each is not None and None not in (step, steps):
        left = each * max(steps - step, 0)
    note = _note(events[-1]) if state in ("failed", "diverged", "refused") else ""
    return Row(
        point["name"], point["overrides"], state, step, steps, metrics, list(curve), _picture(folder), note, seconds,
        starts, left,
    )  # fmt: skip


def _state(
    folder: str, events: Sequence[dict], local: bool, step: int | None, steps: int | None, news: float, now: float
) -> str:
    last = events[-1] if events else {"event": None, "time": 0.0}
    if last["event"] == "ended" and last.get("code") == 0:
        return "done"
    if local and locks.is_held(folder):
        return "running"
    if last["event"] == "ended":
        return CODES.get(last.get("code"), "failed") if _is_number(last.get("code")) else "failed"
    if last["event"] is None and step is None:
        return "waiting"
    if local and last["event"] != "submitted":
        return "interrupted"
    if None not in (step, steps) and step >= steps:
        return "done"
    if step is None or news + 1 < last["time"]:  # what is there is of an earlier start; file times are whole seconds
        return "submitted"
    return "running" if now - news < QUIET else "quiet"


def _note(ended: Mapping[str, Any]) -> str:
    told = ended.get("told")
    if isinstance(told, str) and told.strip():
        return " ".join(told.split())
    code = ended.get("code")
    if isinstance(code, int) and code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"ended by {names.get(-code, f'signal {-code}')}"
    return f"exit code {code}" if _is_number(code) else "ended, nobody knows how"


def _time_of(folder: str, events: Sequence[dict], until: float) -> tuple[float, int, float | None]:
    """Seconds of all starts, how many there were, and seconds a step lately."""
    ticks, _ = _lines(os.path.join(folder, "goodput.jsonl"), _tick_of)
    recent = [tick for tick in ticks if tick[0] == ticks[-1][0]][1:][-RECENT:]  # the first line is of the start
    steps = recent[-1][1] - recent[0][1] if recent else 0
    each = max(recent[-1][2] - recent[0][2], 0.0) / steps if steps > 0 else None
    if not any(event["event"] == "started" for event in events):  # a cluster's: the run itself has kept the time
        return math.fsum(tick[3] for tick in ticks), len({tick[0] for tick in ticks}), each
    seconds, starts, since = 0.0, 0, None
    for event in events:
        if event["event"] == "started":
            starts, since = starts + 1, event["time"] or None
        elif event["event"] == "ended" and since is not None:
            seconds, since = seconds + max(event["time"] - since, 0.0), None
    return seconds + (max(until - since, 0.0) if since is not None else 0.0), starts, each


def _picture(folder: str) -> str | None:
    try:
        found = [
            (re.fullmatch(r"step_(\d+)\.png", path.name), path) for path in epath.Path(folder, "previews").iterdir()
        ]
    except Exception:  # each kind of storage raises its own
        return None
    steps = [(int(match[1]), os.fspath(path)) for match, path in found if match]
    return max(steps)[1] if steps else None


def _evaluation(path: str) -> Iterator[tuple[str, float]]:
    def flat(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
        if isinstance(value, dict) and prefix.count(".") < NESTED:
            for key, inner in value.items():
                if prefix or key != "settings":
                    yield from flat(f"{prefix}.{key}" if prefix else key, inner)
        elif prefix and _is_number(value):
            yield prefix, value

    yield from flat("", read_json(path))


def _metrics_of(line: Any) -> dict[str, float] | None:
    found = {name: value for name, value in line.items() if _is_number(value)} if isinstance(line, dict) else {}
    return found if found.get("step", -1) >= 0 else None


def _event_of(line: Any) -> dict[str, Any] | None:
    known = isinstance(line, dict) and line.get("event") in ("submitted", "started", "ended")
    return {**line, "time": line["time"] if _is_number(line.get("time")) else 0.0} if known else None


def _tick_of(line: Any) -> tuple[str, float, float, float] | None:
    """Attempt, step, time, seconds."""
    if not isinstance(line, dict) or not all(_is_number(line.get(key)) for key in ("step", "time")):
        return None
    seconds = line.get("seconds")
    spent = [value for value in seconds.values() if _is_number(value)] if isinstance(seconds, dict) else []
    return str(line.get("attempt")), line["step"], line["time"], math.fsum(spent)


def _lines(path: str, of: Any) -> tuple[tuple, float]:
    """The whole lines of a JSONL file, as `of` makes them of JSON, without those that it has no use for; when the file
    changed last."""
    try:
        found = epath.Path(path).stat()
        return _whole_lines(path, of, found.mtime, found.length), float(found.mtime)
    except Exception:  # each kind of storage raises its own
        return (), 0.0


@functools.lru_cache(maxsize=4096)
def _whole_lines(path: str, of: Any, changed: float, length: int) -> tuple:
    """Read again only when the file has changed, or who looks every few seconds would read hundreds of files."""
    found = (of(_parse(line)) for line in _text(path).splitlines() if line.strip())
    return tuple(line for line in found if line is not None)


def read_json(path: str) -> Any:
    """What a file of JSON holds; None if it is missing or damaged."""
    return _parse(_text(path))


def _text(path: str) -> str:
    try:
        return epath.Path(path).read_bytes().decode(errors="replace")
    except Exception:  # each kind of storage raises its own
        return ""


def _parse(text: str) -> Any:
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair can be written in JSON, but in no file
            value = json.loads(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
        return value
    except (ValueError, RecursionError):
        return None


def _is_number(value: Any) -> bool:
    """Whether it is one that a float holds."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _is_within(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name
