"""The runs of a sweep on this machine: so many at a time, each until it is done."""

import collections
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from diffusion import files
from diffusion.training.preemption import STOPPED
from diffusion.types import InputError
from launch import locks, results, status
from launch.local import Local
from launch.points import Point
from launch.processes import Supervised

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LOOK, DRAW = 0.2, 1.0  # seconds between two looks at the processes, and between two tables


def until_done(launcher: Local, commands: Sequence[tuple[str, ...]], retries: int) -> int:
    """Runs commands one after the other, with our output; the exit code. A signal has them save and end."""

    def tell(event: Mapping[str, Any]) -> None:
        if event["event"] == "ended" and event["code"]:
            print(f"exit code {event['code']}", file=sys.stderr)

    job = Supervised(commands, launcher.start, retries, tell)
    for number in ENDING:
        signal.signal(number, lambda number, frame: job.stop())
    while not job.advance():
        time.sleep(LOOK)
    return job.code


@dataclasses.dataclass(frozen=True)
class Run:
    """A point on its way: `commands`, what follows `python -m`, are run one after the other."""

    point: Point
    folder: str
    commands: list[tuple[str, ...]]

    def is_done(self, state: str) -> bool:
        """Whether all commands have been run; an evaluation may have been asked for since."""
        evaluated = os.path.exists(os.path.join(self.folder, "evaluation.json"))
        return state == "done" and (evaluated or len(self.commands) == 1)

    def tell(self, event: Mapping[str, Any]) -> None:
        """Adds to what has become of it."""
        lines = files.Lines(os.path.join(self.folder, "events.jsonl"))
        lines.add(json.dumps({"time": time.time(), **event}))
        lines.close()


@dataclasses.dataclass
class Slot:
    """Where one run at a time is."""

    number: int
    run: Run | None = None
    job: Supervised | None = None
    lock: IO | None = None


class Pool:
    """Runs of a sweep whose folder is locked.

    Args:
      workdir: the sweep's.
      launcher: starts their commands.
      runs: all of them; those that are done are left alone, and those that were refused or diverged, unless `again`.
      jobs: how many at a time.
      retries: how often each may crash and be started again.
    """

    def __init__(self, workdir: str, launcher: Local, runs: Sequence[Run], *, jobs: int, retries: int, again: bool):
        self.workdir, self.launcher, self.retries = workdir, launcher, retries
        self.slots = [Slot(number) for number in range(jobs)]
        self.signals = 0
        self.total, self.number = len(runs), signal.SIGTERM
        leave = () if again else ("refused", "diverged")
        states = {row.name: row.state for row in results.read(workdir)}
        self.waiting = collections.deque(
            run for run in runs if states[run.point.name] not in leave and not run.is_done(states[run.point.name])
        )

    def run(self) -> int:
        """Until all have ended, or a signal has ended them: then the exit code for that, else 0."""
        before = {number: signal.signal(number, self._told) for number in ENDING}
        drawer, drawn = status.Drawer(sys.stdout) if sys.stdout.isatty() else None, 0.0
        if not drawer:
            print(f"{self.total} runs, {self.total - len(self.waiting)} of them ended before; python -m launch.status "
                  f"--workdir={self.workdir} shows them")  # fmt: skip
        try:
            while self._advance():
                if drawer and time.monotonic() - drawn > DRAW:
                    drawer.draw(results.read(self.workdir))
                    drawn = time.monotonic()
                time.sleep(LOOK)
            if drawer:
                drawer.draw(results.read(self.workdir))
        except OSError as error:  # its processes end with it
            problem = f"{self.workdir} cannot be written: {error.strerror or error}"
            raise InputError("--workdir", f"{problem}; mend it, and start the same again") from error
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if not self.signals:
            return 0
        return 130 if self.number == signal.SIGINT else STOPPED

    def _told(self, number: int, frame: Any) -> None:
        """The first signal has all save and end, another one ends them at once."""
        self.signals, self.number = self.signals + 1, number
        for slot in self.slots:
            if slot.job:
                slot.job.stop(signal.SIGTERM if self.signals == 1 else signal.SIGKILL)

    def _advance(self) -> bool:
        """Whether anything is left to do."""
        for slot in self.slots:
            if slot.job is None and self.waiting and not self.signals:
                self._begin(slot)
            if slot.job is not None and slot.job.advance():
                self._end(slot)
        return any(slot.job for slot in self.slots) or bool(self.waiting and not self.signals)

    def _begin(self, slot: Slot) -> None:
        run = self.waiting.popleft()
        try:
            slot.lock = locks.hold(run.folder, "--workdir")
        except InputError:  # a process of an earlier sweep is at its last save
            self.waiting.append(run)
            return
        log = os.path.join(run.folder, "log.txt")
        slot.run, number, lock = run, slot.number, slot.lock
        slot.job = Supervised(
            run.commands, lambda command: self.launcher.start(command, number, log, lock), self.retries, run.tell
        )

    def _end(self, slot: Slot) -> None:
        code = slot.job.code
        slot.lock.close()
        run, slot.run, slot.job, slot.lock = slot.run, None, None, None
        rows = results.read(self.workdir)
        results.write_csv(self.workdir, rows)
        if not sys.stdout.isatty():
            row = next(row for row in rows if row.name == run.point.name)
            loss = f", loss {row.metrics['loss']:.4g}" if "loss" in row.metrics else ""
            said = f": {row.note}" if row.note else f" at step {row.step:,}{loss}" if row.step else ""
            print(f"{results.counts(rows)}; {run.point.name} {row.state}{said} (exit code {code})", flush=True)
