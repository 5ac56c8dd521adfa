"""Ends a run that hangs, and reports where."""

import contextlib
import faulthandler
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable

from diffusion.core.types import InputError

HUNG = 70  # the exit code of a job that hung or lost another process
REPORT_SECONDS = 5.0  # how long writing a report may take
CHECKS_PER_LIMIT = 8


class Watchdog:
    """Ends the process if nothing calls `beat` for `limit` seconds.

    The last activity and the stacks of all threads are written to stderr and appended to the file `path`, and worker
    processes of multiprocessing are killed.

    A Python thread watches. It cannot run while another thread holds the GIL in a call that never returns, so with
    every check it also restarts faulthandler's timer, which does not need the GIL. That timer ends the process after
    2 * limit + 5 seconds with exit code 1 and the stacks on stderr alone, and leaves the workers alive. A process has
    one such timer, and so at most one watchdog.

    Only the monotonic clock counts. A process that was suspended (SIGSTOP) has nearly the whole limit again when it
    continues, unless it was suspended for longer than the timer runs: then it ends at once.

    Use it as a context manager around everything that may hang, including the closing of files and workers.

    Args:
      limit: Seconds, met to within an eighth; 0 disables the watchdog.
      path: File of the report, in a folder that exists.
      end_process: Called with exit code 70; `os._exit` in a job. Any other exit would wait for the thread that hangs.

    Raises:
      InputError: The limit is negative or above 1e9.
    """

    def __init__(self, limit: float, path: str, end_process: Callable[[int], None]):
        if not 0 <= limit <= 1e9:
            raise InputError("limit", f"must be seconds up to 1e9, or 0 to disable the watchdog; got {limit}")
        self.limit, self.path, self._end_process = limit, path, end_process
        self._last = ("the start", limit, time.monotonic())
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True) if limit else None

    def __enter__(self) -> "Watchdog":
        if self._thread:
            self.beat("the start")
            self._arm()
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if self._thread:
            self._closed.set()
            self._thread.join()  # it must not restart the timer afterwards
            faulthandler.cancel_dump_traceback_later()

    def beat(self, activity: str, limit: float | None = None) -> None:
        """Records that the run is alive.

        Args:
          activity: What the run does next.
          limit: Seconds that this may take, if not the watchdog's own limit: a compilation, an evaluation.
        """
        limit = self.limit if limit is None else limit
        before, self._last = self._last, (activity, limit, time.monotonic())
        if limit != before[1] and self._thread:
            self._arm()  # immediately: the next activity may hold the GIL

    def _arm(self) -> None:
        faulthandler.dump_traceback_later(2 * self._last[1] + REPORT_SECONDS, exit=True, file=2)

    def _watch(self) -> None:
        pause = self.limit / CHECKS_PER_LIMIT
        seen, idle, before = None, 0.0, time.monotonic()
        while not self._closed.wait(pause):
            self._arm()
            last, now = self._last, time.monotonic()
            # If far more time than the pause has passed, the process itself was suspended; that is not a hang.
            idle = idle + min(now - before, 2 * pause) if last is seen else 0.0
            seen, before = last, now
            if idle >= last[1]:
                try:
                    self._report(*last)
                    for worker in multiprocessing.active_children():
                        worker.kill()  # it would outlive its parent, and keep its memory and its output open
                finally:
                    self._end_process(HUNG)

    def _report(self, activity: str, limit: float, at: float) -> None:
        text = f"\nwatchdog: no activity for {time.monotonic() - at:.1f} s (limit {limit:g} s), since: {activity}\n"
        # Written to a file first: faulthandler holds the GIL while it writes, and a pipe that nobody reads would block.
        with contextlib.suppress(OSError), tempfile.TemporaryFile() as stacks:
            faulthandler.dump_traceback(stacks)
            stacks.seek(0)
            text += stacks.read().decode(errors="replace")
        # A dead disk or a full pipe may be why the run hangs; neither may prevent writing to the other.
        writers = [threading.Thread(target=_append, args=(to, text), daemon=True) for to in (2, self.path)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(REPORT_SECONDS)


def _append(to: int | str, text: str) -> None:
    with contextlib.suppress(OSError), open(to, "ab", buffering=0, closefd=to != 2) as file:
        file.write(text.encode())
