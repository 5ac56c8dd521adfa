"""Where the numbers of a run go: a JSONL file always, TensorBoard where it is installed."""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping

from diffusion.core import files


class MetricWriter:
    """Appends one JSON object a call to `metrics.jsonl`, and writes the same to TensorBoard through clu if tensorflow
    and tensorboard are there.

    Args:
      workdir: the run's folder.
      step: where the run goes on from; lines of later steps, written after the checkpoint that it goes on from, go.

    Raises:
      OSError: from every method, as writing does.
    """

    def __init__(self, workdir: str, step: int):
        self.lines = files.Lines(os.path.join(workdir, "metrics.jsonl"))
        self.cut(step)
        self.board = _tensorboard(workdir) if files.writes() else None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.lines.add(json.dumps({"step": step, **values}))
        if self.board is not None:
            with _as_files_raise():
                self.board.write_scalars(step, values)

    def cut(self, step: int) -> None:
        """Takes back the lines of later steps, and such as are damaged."""
        self.lines.keep(lambda line: _step_of(line) <= step)

    def close(self) -> None:
        self.lines.close()
        if self.board is not None:
            with _as_files_raise():
                self.board.close()


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return math.inf


@contextlib.contextmanager
def _as_files_raise() -> Iterator[None]:
    """TensorFlow has errors of its own for a full disk: `{{node}} what is wrong`, and lines of details."""
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith("tensorflow"):
            raise
        raise OSError(re.sub(r"\{\{.*?\}\}\s*", "", str(error).partition("\n")[0])) from error


def _tensorboard(workdir: str):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from clu import metric_writers  # needs tensorflow and tensorboard
    except ImportError:
        return None
    with _as_files_raise():
        return metric_writers.SummaryWriter(workdir)
