"""The runs of a sweep on this machine: so many at a time, each until it is done."""

import collections
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from diffusion.core import files
from diffusion.core.types import InputError
from diffusion.training.resilience.preemption import STOPPED
from experiments import cli
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
    with Signals() as signals:
        while not job.advance():
            signals.pass_on([job])
            time.sleep(LOOK)
    return job.code


class Signals:
    """Signals to end, which are counted while this is open; who uses it passes them on where no job is just starting.

    The first has all save and end, another one ends them at once.
    """

    def __init__(self):
        self.count, self.last, self._passed_on = 0, 0, 0

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._come) for number in ENDING}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pass_on(self, jobs: Iterable[Supervised]) -> None:
        """Tells jobs of those that have come since the last time."""
        if self.count > self._passed_on:
            self._passed_on = self.count
            for job in jobs:
                job.stop(signal.SIGTERM if self.count == 1 else signal.SIGKILL)

    def _come(self, number: int, frame: Any) -> None:
        self.count, self.last = self.count + 1, number


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
        self.signals, self.total = Signals(), len(runs)
        leave = () if again else ("refused", "diverged")
        states = {row.name: row.state for row in results.read(workdir)}
        self.waiting = collections.deque(
            run for run in runs if states[run.point.name] not in leave and not run.is_done(states[run.point.name])
        )

    def run(self) -> int:
        """Until all have ended, or a signal has ended them: then the exit code for that, else 0."""
        drawer, drawn = status.Generator(sys.stdout) if sys.stdout.isatty() else None, 0.0
        if not drawer:
            print(f"{self.total} runs, {self.total - len(self.waiting)} of them ended before; python -m launch.status "
                  f"--workdir={self.workdir} shows them")  # fmt: skip
        try:
            with self.signals:
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
        if not self.signals.count:
            return 0
        return cli.INTERRUPTED if self.signals.last == signal.SIGINT else STOPPED

    def _advance(self) -> bool:
        """Whether anything is left to do."""
        self.signals.pass_on(slot.job for slot in self.slots if slot.job)
        for slot in self.slots:
            if slot.job is None and self.waiting and not self.signals.count:
                self._begin(slot)
            if slot.job is not None and slot.job.advance():
                self._end(slot)
        return any(slot.job for slot in self.slots) or bool(self.waiting and not self.signals.count)

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
