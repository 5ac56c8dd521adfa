"""Metrics of a training: their means over a logging window, and the writers that receive them."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from diffusion.core import files

LAST = ("bad_steps", "skipped", "learning_rate")  # counters and settings, of which the last value is logged


class Writer(Protocol):
    """Receives metrics. A writer may also have `cut(step)`, called when the run returns to an earlier step."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the metrics of a window that ends at `step`."""
        ...

    def close(self) -> None: ...


class Metrics:
    """Sums metrics over a logging window. Values that are not finite are left out.

    Args:
      state: What `state` returned when the run was saved, so that a resumed run logs the same means.

    Attributes:
      last: The last finite value of each metric that had one.
    """

    def __init__(self, state: Mapping[str, Any] | None = None):
        self.sums = {name: list(pair) for name, pair in (state or {}).items()}
        self.last: dict[str, float] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Adds the metrics of one step."""
        for name, value in values.items():
            if math.isfinite(value):
                self.last[name] = value
                total, count = (0.0, 0) if name in LAST else self.sums.get(name, (0.0, 0))
                self.sums[name] = [total + value, count + 1]

    def flush(self) -> dict[str, float]:
        """Returns the mean of each metric, and starts a new window."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means

    def state(self) -> dict[str, list[float]]:
        """Returns the sum and the number of values of each metric, JSON-able."""
        return {name: list(pair) for name, pair in self.sums.items()}


class JsonLines:
    """Appends one JSON object per call to `metrics.jsonl`.

    Args:
      workdir: The run's folder.
      step: The step that the run resumes from; lines of later steps are removed.

    Raises:
      OSError: From every method, if the file cannot be written.
    """

    def __init__(self, workdir: str, step: int):
        self.lines = files.Lines(os.path.join(workdir, "metrics.jsonl"))
        self.cut(step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.lines.add(files.json_text({"step": step, **values}))

    def cut(self, step: int) -> None:
        """Removes the lines of later steps, and corrupt lines."""
        self.lines.keep(lambda line: _step_of(line) <= step)

    def close(self) -> None:
        self.lines.close()


class TensorBoard:
    """Writes scalars for TensorBoard. Requires tensorflow and tensorboard (requirements-tf.txt).

    Raises:
      ImportError: From the constructor, if they are not installed.
      OSError: From every method, if the files cannot be written.
    """

    def __init__(self, workdir: str):
        from clu import metric_writers  # requires tensorflow

        with _tensorflow_errors_as_os_errors():
            self.writer = metric_writers.SummaryWriter(workdir)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        with _tensorflow_errors_as_os_errors():
            self.writer.write_scalars(step, values)

    def close(self) -> None:
        with _tensorflow_errors_as_os_errors():
            self.writer.close()


def default_writers(workdir: str, step: int) -> list[Writer]:
    """Returns the writers of a workdir: `metrics.jsonl`, and TensorBoard where it is installed."""
    writers: list[Writer] = [JsonLines(workdir, step)]
    if files.writes():
        with contextlib.suppress(ImportError):
            writers.append(TensorBoard(workdir))
    return writers


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf


@contextlib.contextmanager
def _tensorflow_errors_as_os_errors() -> Iterator[None]:
    """Raises TensorFlow's own errors for a full disk (`{{node}} what is wrong`, with many details) as OSError."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("tensorflow"):
            raise
        raise OSError(re.sub(r"\{\{.*?\}\}\s*", "", str(error).partition("\n")[0])) from error
