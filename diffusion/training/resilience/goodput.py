"""Where the wall time of a run went, over all its starts: `goodput.jsonl`.

A line has the `attempt` (one id a start), the `step`, the `seconds` by kind since the attempt's line before, and the
`time`: the wall clock, which may be wrong and is used for `down` alone. The kinds:
  start: until the first step: restoring, opening the data.
  compile: of the train step.
  step: the training itself.
  data: waiting for a batch.
  checkpoint: the part of a save that the run waits for.
  preview: evaluation and pictures.
  other: all that is in no span.
"""

import contextlib
import json
import math
import os
import secrets
import time
from collections.abc import Iterator
from typing import Any

from etils import epath

from diffusion.core import files
from diffusion.core.types import InputError

FILE = "goodput.jsonl"
KINDS = ("start", "compile", "step", "data", "checkpoint", "preview", "other")


class Goodput:
    """Sorts a run's time into kinds; every second has exactly one. For one thread of one process.

    Args:
      workdir: the run's folder, which exists.
      start: the step that the run goes on from.
      since: `time.monotonic()` when the start began; now by default.
    """

    def __init__(self, workdir: str, start: int, *, since: float | None = None):
        self.lines = files.Lines(os.path.join(workdir, FILE))
        self.attempt = secrets.token_hex(4)
        self._open = ["start"]  # spans, the innermost last; below them what is in none
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._mark = time.monotonic() if since is None else since
        self.write(start)

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Counts what is done in it as `kind`; a span within has its time to itself."""
        if kind not in KINDS:
            raise ValueError(f"no kind {kind!r}; one of {KINDS}")
        self._count()
        if kind == "flow_map":
            self._open[0] = "other"
        self._open.append(kind)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def count_as(self, kind: str) -> None:
        """Makes the open span one of another kind, from its beginning or the end of the last span within it: waiting
        for a batch while the device is at work on a step is `step`."""
        self._open[-1] = kind

    def write(self, step: int) -> None:
        """Appends a line: the run is at `step`."""
        self._count()
        seconds = {kind: round(value, 6) for kind, value in self._seconds.items() if value}
        line = {"attempt": self.attempt, "step": step, "seconds": seconds, "time": round(time.time(), 3)}
        self.lines.add(json.dumps(line))
        self._seconds = dict.fromkeys(KINDS, 0.0)

    def close(self) -> None:
        self.lines.close()

    def _count(self) -> None:
        now = time.monotonic()
        self._seconds[self._open[-1]] += now - self._mark
        self._mark = now


def summary(workdir: str) -> dict[str, Any]:
    """The totals of a run, in seconds.

    Returns:
      seconds: by kind.
      total: their sum. What an attempt did after its last line is not known, and in none of them.
      lost: the part of `step` that went into steps beyond the one that a later attempt began at.
      down: between the last line of an attempt and the next start, as the wall clock has it, never negative. It is not
        in the total: a run that is extended a week later was not down for a week.
      goodput: (step - lost) / total, in [0, 1].
      starts: how many attempts there are.
      step: the last attempt's last.

    Raises:
      InputError: there is no such folder, or no line in it.
    """
    attempts = list(_read(workdir).values())
    lost, down, bound, after = 0.0, 0.0, math.inf, None
    for lines in reversed(attempts):
        at = lines[0]["step"]
        for line in lines:
            # Time is shared evenly among the steps of a line.
            share = (line["step"] - bound) / max(line["step"] - at, 1)
            lost += min(max(share, 0.0), 1.0) * line["seconds"].get("step", 0.0)
            at = line["step"]
        if after is not None:
            down += max(after - lines[-1]["time"], 0.0)
        after = lines[0]["time"] - sum(lines[0]["seconds"].values())
        bound = min(bound, lines[0]["step"])
    lines = [line for attempt in attempts for line in attempt]
    seconds = {kind: math.fsum(line["seconds"].get(kind, 0.0) for line in lines) for kind in KINDS}
    total = math.fsum(seconds.values())
    return {
        "seconds": seconds,
        "total": total,
        "lost": lost,
        "down": down,
        "goodput": (seconds["step"] - lost) / total if total else 0.0,
        "starts": len(attempts),
        "step": lines[-1]["step"],
    }


def _read(workdir: str) -> dict[str, list[dict]]:
    """The lines of each attempt, both in order; damaged ones are left out."""
    path = os.path.join(workdir, FILE)
    if not epath.Path(workdir).is_dir():
        raise InputError("workdir", f"{workdir} does not exist")
    if not epath.Path(path).exists():
        raise InputError("workdir", f"{workdir} has no {FILE}; training writes it")
    attempts = {}
    for text in epath.Path(path).read_bytes().decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            line = json.loads(text)
            math.fsum((line["step"], line["time"], *line["seconds"].values()))  # all are numbers
            attempts.setdefault(str(line["attempt"]), []).append(line)
    if not attempts:
        raise InputError("workdir", f"{path} has no whole line; training writes the first when it starts")
    return attempts
