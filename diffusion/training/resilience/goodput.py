"""Accounts for the wall time of a run over all its starts, in `goodput.jsonl`.

A line has the `attempt` (one id per start), the `step`, the `seconds` of each kind since the previous line of the
attempt, and the `time`, the wall clock, which may be wrong and is used for `down` alone. The kinds:
  start: until the first step: restoring, opening the data.
  compile: compilation of the train step.
  step: training.
  data: waiting for a batch.
  checkpoint: the part of a save for which the run waits.
  preview: evaluation and sample images.
  other: everything outside these spans.
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
    """A meter that assigns every second of a run to exactly one kind, for one thread of one process.

    Args:
      workdir: The run's folder, which must exist.
      start: The step from which the run resumes.
      since: `time.monotonic()` at the beginning of the start; now by default.
    """

    def __init__(self, workdir: str, start: int, *, since: float | None = None):
        self.lines = files.Lines(os.path.join(workdir, FILE))
        self.attempt = secrets.token_hex(4)
        self._open = [
            "start"
        ]  # nested spans, the innermost last; the first entry is the kind of the time outside all spans
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._mark = time.monotonic() if since is None else since
        self.write(start)

    @contextlib.contextmanager
    def spent(self, kind: str) -> Iterator[None]:
        """Counts the time inside the context as `kind`, except for that of nested contexts."""
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; choose one of {KINDS}")
        self._count()
        if kind == "step":
            self._open[0] = "other"
        self._open.append(kind)
        try:
            yield
        finally:
            self._count()
            self._open.pop()

    def count_as(self, kind: str) -> None:
        """Changes the kind of the innermost open span, from its beginning or the end of the last span nested in it.

        For example, waiting for a batch while the device computes a step counts as `step`.
        """
        self._open[-1] = kind

    def write(self, step: int) -> None:
        """Appends a line for `step`, with the seconds since the previous line."""
        self._count()
        seconds = {kind: round(value, 6) for kind, value in self._seconds.items() if value}
        line = {"attempt": self.attempt, "step": step, "seconds": seconds, "time": round(time.time(), 3)}
        self.lines.add(files.json_text(line))
        self._seconds = dict.fromkeys(KINDS, 0.0)

    def close(self) -> None:
        """Closes the file."""
        self.lines.close()

    def _count(self) -> None:
        now = time.monotonic()
        self._seconds[self._open[-1]] += now - self._mark
        self._mark = now


def summary(workdir: str) -> dict[str, Any]:
    """Returns the totals of a run, in seconds.

    Returns:
      seconds: By kind.
      total: Their sum. The time of an attempt after its last line is unknown and not included.
      lost: The part of `step` spent on steps that a later attempt repeated.
      down: Time between the last line of an attempt and the next start by the wall clock, never negative. It is not
        part of the total: a run that is extended a week later was not down for a week.
      goodput: (step - lost) / total, in [0, 1].
      starts: The number of attempts.
      step: The last step of the last attempt.

    Raises:
      InputError: The folder does not exist, or has no line.
    """
    attempts = list(_read(workdir).values())
    lost, down, bound, after = 0.0, 0.0, math.inf, None
    for lines in reversed(attempts):
        at = lines[0]["step"]
        for line in lines:
            # The time of a line is divided evenly among its steps.
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
    """Returns the lines of each attempt, both in order, without invalid ones."""
    path = os.path.join(workdir, FILE)
    if not epath.Path(workdir).is_dir():
        raise InputError("workdir", f"{workdir} does not exist")
    if not epath.Path(path).exists():
        raise InputError("workdir", f"{workdir} has no {FILE}; training writes it")
    attempts = {}
    for text in epath.Path(path).read_bytes().decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            line = json.loads(text)
            math.fsum((line["step"], line["time"], *line["seconds"].values()))  # raises unless all are numbers
            attempts.setdefault(str(line["attempt"]), []).append(line)
    if not attempts:
        raise InputError("workdir", f"{path} has no complete line; training writes the first one when it starts")
    return attempts
