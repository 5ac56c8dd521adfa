"""Where the numbers of a run go: a JSONL file always, TensorBoard where it is installed."""

import json
import os
from collections.abc import Mapping

from diffusion import files


class MetricWriter:
    """Appends one JSON object a call to `metrics.jsonl`, and writes the same to TensorBoard through clu if tensorflow
    and tensorboard are there.

    Args:
      workdir: the run's folder.
      step: where the run goes on from; lines of later steps, written after the checkpoint that it goes on from, go.
    """

    def __init__(self, workdir: str, step: int):
        self.path = os.path.join(workdir, "metrics.jsonl")
        _cut_after(self.path, step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self.board = _tensorboard(workdir)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board is not None:
            self.board.write_scalars(step, values)

    def cut(self, step: int) -> None:
        """Takes back the lines of later steps."""
        self.file.close()
        _cut_after(self.path, step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def close(self) -> None:
        self.file.close()
        if self.board is not None:
            self.board.close()


def _cut_after(path: str, step: int) -> None:
    if not os.path.exists(path):
        return
    with open(path, encoding="utf-8") as lines:
        # A line without its end was cut by a kill.
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    with files.replace(path) as file:
        file.writelines(kept)


def _tensorboard(workdir: str):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        from clu import metric_writers  # needs tensorflow and tensorboard
    except ImportError:
        return None
    return metric_writers.SummaryWriter(workdir)
