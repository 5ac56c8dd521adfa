"""Processes of jobs on this machine: started together, ended together, started again until the job is done."""

import collections
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from diffusion.training.resilience.preemption import STOPPED

FINAL = (0, 2, 3)  # done, bad input, diverged: to start it again would change nothing
LOSS = 45.0  # seconds that the others have to find out that one is lost, and end
LAST = 20.0  # seconds from a signal to end to one that ends
PAUSE, STOPPED_PAUSE = 5.0, 1.0  # seconds before what has crashed, or has stopped, is started again
TOLD = 400  # characters of a process's last line that are kept

# A process whose parent is gone is told to end, so that it saves and nobody finds it still training. Linux alone has
# that; elsewhere the lock that it holds on tells of it.
_TIED = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(75)
os.execv(sys.argv[2], sys.argv[2:])
"""


class Start:
    """The processes of one start of a job.

    Args:
      command: what follows `python -m`.
      environments: what each process finds in its environment beside ours; as many processes as there are of them.
      log: the file that their output is appended to; ours if None.
      lock: a file that they keep open.
    """

    def __init__(
        self, command: Sequence[str], environments: Sequence[Mapping[str, str]], log: str | None = None,
        lock: IO | None = None,
    ):  # fmt: skip
        self.log, self._lost, self._signalled = log, None, False
        self.processes = []
        output = open(log, "ab") if log else None  # noqa: SIM115
        self._from = output.tell() if output else 0
        for environment, flags in zip(environments, _together(len(environments)), strict=True):
            self.processes.append(subprocess.Popen(
                [sys.executable, "-c", _TIED, str(os.getpid()), sys.executable, "-m", *command, *flags],
                env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                # ctrl-C in the terminal is for us alone: we tell them.
                start_new_session=True, pass_fds=[lock.fileno()] if lock else [],
            ))  # fmt: skip
        if output:
            output.close()

    def poll(self) -> int | None:
        """The exit code of all, once all have ended. If one has failed, the others have some time to end as well."""
        codes = [process.poll() for process in self.processes]
        if None not in codes:
            return together(codes)
        if self._lost is None and any(codes):
            self._lost = time.monotonic()
        if self._lost is not None:
            late = time.monotonic() - self._lost - LOSS
            if late > LAST:
                self.send(signal.SIGKILL)
            elif late > 0 and not self._signalled:
                self._signalled = True
                self.send(signal.SIGTERM)
        return None

    def send(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def told(self) -> str:
        """The error that the log has last, or else its last line, of this start; nothing if there is no log."""
        if not self.log:
            return ""
        with open(self.log, "rb") as file:
            file.seek(self._from)
            lines = collections.deque(filter(None, map(bytes.strip, file.read().splitlines())), maxlen=20)
        errors = [line for line in lines if line.startswith(b"error:")]
        return (errors or lines or [b""])[-1].decode(errors="replace")[:TOLD]


class Supervised:
    """One job, whose commands are run one after the other, each started again until it is done.

    Exit codes 0, 2 and 3 are final. 75, stopped and saved, starts it again and does not count; any other does so
    `retries` times.

    Args:
      commands: what follows `python -m`.
      begin: starts one of them.
      retries: how often it may crash and be started again.
      tell: is given what happens, JSON-able.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], begin: Callable[[Sequence[str]], Start], retries: int,
        tell: Callable[[Mapping[str, Any]], None],
    ):  # fmt: skip
        self.code: int | None = None
        self._commands, self._begin, self._retries, self._tell = list(commands), begin, retries, tell
        self._running: Start | None = None
        self._stopping, self._crashes, self._next = False, 0, 0.0

    def advance(self) -> bool:
        """Does what there is to do, and returns at once; whether the job has ended, with exit code `code`."""
        if self.code is None and self._running is None:
            if self._stopping:
                self.code = STOPPED
            elif time.monotonic() >= self._next:
                self._running = self._begin(self._commands[0])
                self._tell({"event": "started", "command": self._commands[0][0]})
        code = self._running.poll() if self._running else None
        if code is not None:
            self._end(code, self._running.told())
            self._running = None
        return self.code is not None

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Has it save and end; it is not started again."""
        self._stopping = True
        if self._running:
            self._running.send(number)

    def _end(self, code: int, told: str) -> None:
        if code == 0 and len(self._commands) > 1:
            self._tell({"event": "next", "command": self._commands.pop(0)[0]})
            return
        self._tell({"event": "ended", "code": code, "told": told if code else ""})
        if code in FINAL or self._stopping:
            self.code = code
        elif code == STOPPED:
            self._next = time.monotonic() + STOPPED_PAUSE
        else:
            self._crashes += 1
            self._next = time.monotonic() + PAUSE
            if self._crashes > self._retries:
                self.code = code


def together(codes: Sequence[int]) -> int:
    """The exit code of a job whose processes have ended with these: what is final comes first, then what crashed it."""
    codes = [code if code >= 0 else 128 - code for code in codes]  # of a signal, as a shell has it
    for final in (2, 3):
        if final in codes:
            return final
    crashed = [code for code in codes if code not in (0, STOPPED)]
    # A process that is lost takes the others with it: the first cause is a signal.
    return max(crashed, default=max(codes))


def _together(count: int) -> list[list[str]]:
    """The flags by which so many processes of one machine find each other."""
    if count == 1:
        return [[]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    return [[where, f"--num_processes={count}", f"--process_id={number}"] for number in range(count)]
