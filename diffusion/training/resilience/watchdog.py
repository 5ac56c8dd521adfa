"""Ends a run that has got stuck, and says where."""

import contextlib
import faulthandler
import multiprocessing
import os
import tempfile
import threading
import time

from diffusion.core.types import InputError

STUCK = 70  # the exit code
GRACE = 5.0  # seconds that a report may take
LOOKS = 8  # a limit


class Watchdog:
    """Ends the process with exit code 70 if nothing calls `beat` for `limit` seconds. The last beat and the stacks of
    all threads go to stderr and are appended to the file `path`. Worker processes of multiprocessing end with it.

    A thread of Python keeps the watch. It is helpless while another thread holds the GIL in a call that never
    returns, so it winds up faulthandler's timer, which needs no GIL, with every look. That one ends the process after
    2 * limit + 5 seconds, with exit code 1 and the stacks on stderr alone, and leaves the workers alive. There is one
    such timer in a process, and so one watchdog.

    Only the monotonic clock counts. A process that was stopped (SIGSTOP) and goes on has nearly the whole limit anew,
    unless it was stopped for longer than the timer runs: then it ends when it is continued.

    Use it as a context manager, around whatever may hang, the end of the run included: what closes files and workers
    can hang too.

    Args:
      limit: seconds, met to an eighth; 0 for no watch.
      path: of the report, in a folder that exists.

    Raises:
      InputError: the limit is negative or beyond 1e9.
    """

    def __init__(self, limit: float, path: str):
        if not 0 <= limit <= 1e9:
            raise InputError("limit", f"must be seconds up to 1e9, or 0 for no watch, got {limit}")
        self.limit, self.path = limit, path
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
            self._thread.join()  # it must not wind the timer up again
            faulthandler.cancel_dump_traceback_later()

    def beat(self, what: str, limit: float | None = None) -> None:
        """Says that the run is alive.

        Args:
          what: the run does next.
          limit: seconds that this may take, where it is not the watchdog's own limit: a compilation, an evaluation.
        """
        limit = self.limit if limit is None else limit
        before, self._last = self._last, (what, limit, time.monotonic())
        if limit != before[1] and self._thread:
            self._arm()  # at once: what comes next may hold the GIL

    def _arm(self) -> None:
        faulthandler.dump_traceback_later(2 * self._last[1] + GRACE, exit=True, file=2)

    def _watch(self) -> None:
        pause = self.limit / LOOKS
        seen, idle, before = None, 0.0, time.monotonic()
        while not self._closed.wait(pause):
            self._arm()
            last, now = self._last, time.monotonic()
            # Far longer than the pause is no sign of a run that is stuck: the process itself was stopped.
            idle = idle + min(now - before, 2 * pause) if last is seen else 0.0
            seen, before = last, now
            if idle >= last[1]:
                try:
                    self._report(*last)
                    for worker in multiprocessing.active_children():
                        worker.kill()  # it would outlive its parent, and hold its memory and its output open
                finally:
                    os._exit(STUCK)  # any other exit waits for the thread that is stuck

    def _report(self, what: str, limit: float, at: float) -> None:
        text = f"\nwatchdog: no sign of life for {time.monotonic() - at:.1f} s (limit {limit:g} s), since: {what}\n"
        # By way of a file, because faulthandler holds the GIL while it writes: into a pipe that nobody reads, for ever.
        with contextlib.suppress(OSError), tempfile.TemporaryFile() as stacks:
            faulthandler.dump_traceback(stacks)
            stacks.seek(0)
            text += stacks.read().decode(errors="replace")
        # A dead disk or a full pipe may be why the run is stuck; each must not keep the other from being written.
        writers = [threading.Thread(target=_append, args=(to, text), daemon=True) for to in (2, self.path)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join(GRACE)


def _append(to: int | str, text: str) -> None:
    with contextlib.suppress(OSError), open(to, "ab", buffering=0, closefd=to != 2) as file:
        file.write(text.encode())
