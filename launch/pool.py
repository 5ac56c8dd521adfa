"""Runs the points of a sweep on this machine, a fixed number at a time, each until it is done."""

import collections
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import IO, Any

from diffusion.core import files, locks
from diffusion.core.types import InputError
from diffusion.training.resilience.preemption import PREEMPTED
from experiments import cli
from launch import results, status
from launch.local import Local
from launch.points import SweepPoint
from launch.processes import SupervisedJob

TERMINATION_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_INTERVAL, DRAW_INTERVAL = 0.2, 1.0  # seconds between polls of the processes, and between redraws of the table


def run_until_done(launcher: Local, commands: Sequence[tuple[str, ...]], retries: int) -> int:
    """Runs commands one after the other, showing their output, and returns the exit code.

    On a termination signal the running command saves and exits.
    """

    def report_failure(event: Mapping[str, Any]) -> None:
        if event["event"] == "ended" and event["code"]:
            print(f"exit code {event['code']}", file=sys.stderr)

    job = SupervisedJob(commands, launcher.start, retries, report_failure)
    with TerminationSignals() as signals:
        while not job.advance():
            signals.forward_to([job])
            time.sleep(POLL_INTERVAL)
    return job.code


class TerminationSignals:
    """A context that counts termination signals, to be forwarded at a moment when no job is being started.

    The first signal makes the jobs save and exit, the second kills them.
    """

    def __init__(self):
        self.count, self.last, self._forwarded = 0, 0, 0

    def __enter__(self) -> "TerminationSignals":
        self._previous = {number: signal.signal(number, self._handle) for number in TERMINATION_SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def forward_to(self, jobs: Iterable[SupervisedJob]) -> None:
        """Forwards the signals that have arrived since the last call."""
        if self.count > self._forwarded:
            self._forwarded = self.count
            for job in jobs:
                job.stop(signal.SIGTERM if self.count == 1 else signal.SIGKILL)

    def _handle(self, number: int, frame: Any) -> None:
        self.count, self.last = self.count + 1, number


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """The run of a sweep's point.

    Attributes:
      point: The point.
      folder: Its workdir.
      commands: The words after `python -m` of each command. They run one after the other.
    """

    point: SweepPoint
    folder: str
    commands: list[tuple[str, ...]]

    def is_done(self, state: str) -> bool:
        """Returns whether all commands have run. A later sweep may have added the evaluation."""
        evaluated = os.path.exists(os.path.join(self.folder, "evaluation.json"))
        return state == "done" and (evaluated or len(self.commands) == 1)

    def record_event(self, event: Mapping[str, Any]) -> None:
        """Appends an event to the run's `events.jsonl`."""
        lines = files.Lines(os.path.join(self.folder, "events.jsonl"))
        lines.add(files.json_text({"time": time.time(), **event}))
        lines.close()


@dataclasses.dataclass
class Slot:
    """A place for one run at a time, with the run's job and lock."""

    number: int
    run: SweepRun | None = None
    job: SupervisedJob | None = None
    lock: IO | None = None


class Pool:
    """Executes the runs of a sweep whose folder is locked.

    Args:
      workdir: The folder of the sweep.
      launcher: Starts the commands.
      runs: All runs of the sweep. Runs that are done are skipped, and unless `again` so are those that were refused or
        diverged.
      jobs: Number of concurrent runs.
      retries: How often each run is restarted after a crash.
      again: Whether refused and diverged runs are started again.
    """

    def __init__(
        self, workdir: str, launcher: Local, runs: Sequence[SweepRun], *, jobs: int, retries: int, again: bool
    ):
        self.workdir, self.launcher, self.retries = workdir, launcher, retries
        self.slots = [Slot(number) for number in range(jobs)]
        self.signals, self.total = TerminationSignals(), len(runs)
        skipped = () if again else ("refused", "diverged")
        states = {row.name: row.state for row in results.read(workdir)}
        self.waiting = collections.deque(
            run for run in runs if states[run.point.name] not in skipped and not run.is_done(states[run.point.name])
        )

    def run(self) -> int:
        """Runs until all runs have ended, or until a signal has ended them. Returns the signal's exit code, or 0."""
        live_table, drawn = status.LiveTable(sys.stdout) if sys.stdout.isatty() else None, 0.0
        if not live_table:
            print(f"{self.total} runs, {self.total - len(self.waiting)} of them already ended; show them with "
                  f"python -m launch.status --workdir={self.workdir}")  # fmt: skip
        try:
            with self.signals:
                while self._advance():
                    if live_table and time.monotonic() - drawn > DRAW_INTERVAL:
                        live_table.draw(results.read(self.workdir))
                        drawn = time.monotonic()
                    time.sleep(POLL_INTERVAL)
            if live_table:
                live_table.draw(results.read(self.workdir))
        except OSError as error:  # the running processes end together with this one
            problem = f"{self.workdir} cannot be written: {error.strerror or error}"
            raise InputError("--workdir", f"{problem}; fix this and rerun the same command") from error
        if not self.signals.count:
            return 0
        return cli.INTERRUPTED if self.signals.last == signal.SIGINT else PREEMPTED

    def _advance(self) -> bool:
        """Starts and polls jobs without waiting. Returns whether anything is left to do."""
        self.signals.forward_to(slot.job for slot in self.slots if slot.job)
        for slot in self.slots:
            if slot.job is None and self.waiting and not self.signals.count:
                self._start_next(slot)
            if slot.job is not None and slot.job.advance():
                self._finish(slot)
        return any(slot.job for slot in self.slots) or bool(self.waiting and not self.signals.count)

    def _start_next(self, slot: Slot) -> None:
        run = self.waiting.popleft()
        try:
            slot.lock = locks.hold(run.folder, "--workdir")
        except InputError:  # a process of an earlier sweep is still saving
            self.waiting.append(run)
            return
        log = os.path.join(run.folder, "log.txt")
        slot.run, number, lock = run, slot.number, slot.lock
        slot.job = SupervisedJob(
            run.commands, lambda command: self.launcher.start(command, number, log, lock), self.retries,
            run.record_event,
        )  # fmt: skip

    def _finish(self, slot: Slot) -> None:
        code = slot.job.code
        slot.lock.close()
        run, slot.run, slot.job, slot.lock = slot.run, None, None, None
        rows = results.read(self.workdir)
        results.write_csv(self.workdir, rows)
        if not sys.stdout.isatty():
            row = next(row for row in rows if row.name == run.point.name)
            loss = f", loss {row.metrics['loss']:.4g}" if "loss" in row.metrics else ""
            detail = f": {row.note}" if row.note else f" at step {row.step:,}{loss}" if row.step else ""
            print(f"{results.counts(rows)}; {run.point.name} {row.state}{detail} (exit code {code})", flush=True)
