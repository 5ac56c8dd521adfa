"""Being told to stop: the step is finished and saved, and the job ends so that it may be started again."""

import os
import signal
import sys
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STOPPED = 75  # the exit code of a job that is to be started again


class Preempted(Exception):
    """The run was told to stop, and is saved."""


def stop_at_once() -> None:
    """From now on, outside of a `Preemption`, SIGTERM and SIGINT end the process with exit code 75: before the first
    step and after the last there is nothing to save."""
    for number in SIGNALS:
        signal.signal(number, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    os.write(sys.stderr.fileno(), f"{name}: stopped outside of training; start it again to go on\n".encode())
    os._exit(STOPPED)


class Preemption:
    """While it is entered, the first SIGTERM or SIGINT is noted, and the second ends the process at once.

    Attributes:
      requested: whether one has come.
    """

    def __init__(self):
        self.requested = False
        self._before = {}

    def __enter__(self) -> "Preemption":
        # Signals are the main thread's alone; a training in another is not told.
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        name = signal.Signals(number).name
        # Not print: the signal may have come while something is being printed.
        os.write(sys.stderr.fileno(), f"{name}: saving after this step; again to end at once\n".encode())
