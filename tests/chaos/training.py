"""Starts trainings of `tests/chaos/config.py` as a user does, and reads their results."""

import collections
import json
import os
import pathlib
import random
import socket
import subprocess
import sys
import time

import numpy as np

from tests.chaos.config import CASES

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 90  # seconds that a start may take


def notes_of(workdir):
    """Returns the folder for the notes of a training, outside the workdir and its disk."""
    return workdir.parents[1] / f"{workdir.parent.name}_{workdir.name}_notes"


class Training:
    """The processes of one start.

    Args:
      case: A name in `tests/chaos/config.py`.
      before: The command that starts each process.
      settings: `pace`, `hangs` and `clock`; see the end of that file.
    """

    def __init__(self, case, workdir, processes, *, compiled, teachers=None, flags=(), before=(), **settings):
        notes = notes_of(workdir)
        notes.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [*before, sys.executable, "-m", "experiments.train", f"--config=tests/chaos/config.py:{case}",
                   f"--workdir={workdir}", f"--compiled={compiled}", *flags]  # fmt: skip
        if CASES.get(case, {}).get("teacher"):
            command.append(f"--config.objective.teacher={teachers}/{CASES[case]['teacher']}")
        settings = {name.upper(): str(value) for name, value in {"notes": notes, **settings}.items()}
        environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", **settings}
        self.workdir, self.notes, self.logs, self.processes = workdir, notes, [], []
        for rank in range(processes):
            together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}", f"--process_id={rank}"]
            self.logs.append(notes / f"log.{rank}")
            (notes / f"doing.{rank}").unlink(missing_ok=True)
            with open(self.logs[-1], "w") as log:
                self.processes.append(subprocess.Popen(
                    [*command, *(together if processes > 1 else [])], cwd=ROOT, env={**environment, "RANK": str(rank)},
                    stdout=log, stderr=subprocess.STDOUT,
                ))  # fmt: skip

    def done(self):
        """Returns the activities of the first process, in order; none before it has read the config."""
        path = self.notes / "doing.0"
        return path.read_text().splitlines() if path.exists() else []

    def doing(self):
        return (self.done() or ["the start"])[-1]

    def running(self):
        return any(process.poll() is None for process in self.processes)

    def until(self, condition):
        """Waits for a condition or the end, and returns whether the training still runs."""
        began = time.monotonic()
        while self.running() and not condition():
            assert time.monotonic() - began < LIMIT, self.output()
            time.sleep(0.005)
        return self.running()

    def until_doing(self, what):
        """Waits until an activity begins or the training ends, and returns whether it still runs."""
        return self.until(lambda: any(line.startswith(what) for line in self.done()))

    def kill(self):
        for process in random.sample(self.processes, len(self.processes)):
            process.kill()
            process.wait()

    def wait(self):
        self.until(lambda: False)
        return [process.returncode for process in self.processes]

    def output(self):
        return "\n".join(log.read_text() for log in self.logs)


def committed(workdir):
    folder = workdir / "checkpoints"
    return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=None)


def outcome(workdir):
    """Returns the results of a run: its arrays, its metrics by step, and the hashes of each step's batch by process."""
    notes = notes_of(workdir)
    metrics = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in metrics:
        del line["images_per_second"]
    batches = collections.defaultdict(set)
    for path in notes.glob("batches.*"):
        for line in path.read_text().splitlines():
            step, digest = line.split()
            batches[path.name, int(step)].add(digest)
    return dict(np.load(notes / "state.npz")), metrics, dict(batches)
