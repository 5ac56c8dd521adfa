"""Handles the signals that stop a job: the current step is finished and saved, so that the job can be resumed."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)
PREEMPTED = 75  # the exit code of a preempted job; running it again resumes it


class Preempted(Exception):
    """The run was asked to stop, and is saved."""


class Preemption:
    """Handles SIGTERM and SIGINT while it is entered.

    The first signal is recorded; the second ends the process immediately. Python delivers signals to the main thread
    only, so entering it in another thread has no effect.

    Args:
      end_process: Called with 128 + the signal's number at the second signal; `os._exit` in a job.

    Attributes:
      requested: Whether a signal has arrived.
    """

    def __init__(self, end_process: Callable[[int], None]):
        self.requested = False
        self._end_process, self._before = end_process, {}

    def __enter__(self) -> "Preemption":
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            self._end_process(128 + number)
        self.requested = True
        name = signal.Signals(number).name
        # Not through a stream: the signal may have arrived while something is being printed.
        os.write(sys.stderr.fileno(), f"{name}: saving after this step; send it again to exit immediately\n".encode())
