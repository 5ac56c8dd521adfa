"""The processes of jobs on this machine: started together, ended together and restarted until the job is done."""

import collections
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from diffusion.core import locks
from diffusion.training.resilience.preemption import PREEMPTED

FINAL_CODES = (0, 2, 3)  # done, bad input, diverged: a restart would end the same way
PEER_TIMEOUT = 45.0  # seconds that the other processes have to notice a lost one and exit
KILL_TIMEOUT = 20.0  # seconds between SIGTERM and SIGKILL
RETRY_DELAY, PREEMPTED_DELAY = 5.0, 1.0  # seconds before the restart of a crashed and of a preempted job
MAX_MESSAGE_LENGTH = 400

# Asks Linux to send SIGTERM to the process when its parent ends, so that it saves and exits instead of training on as
# an orphan. Other systems lack this; there the lock that the process still holds shows that it is running.
_WRAPPER = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(75)
os.execv(sys.argv[2], sys.argv[2:])
"""


class JobProcesses:
    """The processes of one start of a job.

    Args:
      command: The words after `python -m`.
      environments: One mapping per process, with variables to set in addition to the current environment.
      log: File to which the output is appended; None for the output of this process.
      lock: A lock of `core.locks` that the processes share.
    """

    def __init__(
        self, command: Sequence[str], environments: Sequence[Mapping[str, str]], log: str | None = None,
        lock: IO | None = None,
    ):  # fmt: skip
        self.log, self._failed_at, self._terminated = log, None, False
        self.processes = []
        output = open(log, "ab") if log else None  # noqa: SIM115
        self._log_start = output.tell() if output else 0
        for environment, flags in zip(environments, _multihost_flags(len(environments)), strict=True):
            self.processes.append(subprocess.Popen(
                [sys.executable, "-c", _WRAPPER, str(os.getpid()), sys.executable, "-m", *command, *flags],
                env={**os.environ, **environment, **(locks.passed(lock) if lock else {})}, stdin=subprocess.DEVNULL,
                stdout=output, stderr=output,
                # ctrl-C in the terminal reaches this process only, which forwards it.
                start_new_session=True, pass_fds=[lock.fileno()] if lock else [],
            ))  # fmt: skip
        if output:
            output.close()

    def poll(self) -> int | None:
        """Returns the job's exit code once all processes have ended, else None.

        If one process has failed, the others are terminated, and later killed, if they do not end by themselves.
        """
        codes = [process.poll() for process in self.processes]
        if None not in codes:
            return combined_exit_code(codes)
        if self._failed_at is None and any(codes):
            self._failed_at = time.monotonic()
        if self._failed_at is not None:
            overdue = time.monotonic() - self._failed_at - PEER_TIMEOUT
            if overdue > KILL_TIMEOUT:
                self.send(signal.SIGKILL)
            elif overdue > 0 and not self._terminated:
                self._terminated = True
                self.send(signal.SIGTERM)
        return None

    def send(self, number: int) -> None:
        """Sends a signal to all processes that are running."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)

    def last_message(self) -> str:
        """Returns the last `error:` line that this start has logged, or else its last line; "" without a log."""
        if not self.log:
            return ""
        with open(self.log, "rb") as file:
            file.seek(self._log_start)
            lines = collections.deque(filter(None, map(bytes.strip, file.read().splitlines())), maxlen=20)
        errors = [line for line in lines if line.startswith(b"error:")]
        return (errors or lines or [b""])[-1].decode(errors="replace")[:MAX_MESSAGE_LENGTH]


class SupervisedJob:
    """A job whose commands run one after the other, each restarted until it is done.

    Exit codes 0, 2 and 3 are final. After 75 (preempted after saving) the command restarts, which does not count as a
    retry. After any other exit code it restarts at most `retries` times.

    Args:
      commands: The words after `python -m` of each command.
      start: Starts a command.
      retries: How often the job is restarted after a crash.
      on_event: Receives a JSON-serializable mapping for each event.
    """

    def __init__(
        self, commands: Sequence[Sequence[str]], start: Callable[[Sequence[str]], JobProcesses], retries: int,
        on_event: Callable[[Mapping[str, Any]], None],
    ):  # fmt: skip
        self.code: int | None = None
        self._commands, self._start, self._retries, self._on_event = list(commands), start, retries, on_event
        self._running: JobProcesses | None = None
        self._stopping, self._crashes, self._next_start = False, 0, 0.0

    def advance(self) -> bool:
        """Starts or polls the current command without waiting.

        Returns:
          Whether the job has ended; its exit code is `code`.
        """
        if self.code is None and self._running is None:
            if self._stopping:
                self.code = PREEMPTED
            elif time.monotonic() >= self._next_start:
                self._running = self._start(self._commands[0])
                self._on_event({"event": "started", "command": self._commands[0][0]})
        code = self._running.poll() if self._running else None
        if code is not None:
            self._handle_exit(code, self._running.last_message())
            self._running = None
        return self.code is not None

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Sends a signal to the processes. The job saves, exits and is not restarted."""
        self._stopping = True
        if self._running:
            self._running.send(number)

    def _handle_exit(self, code: int, message: str) -> None:
        if code == 0 and len(self._commands) > 1:
            self._on_event({"event": "next", "command": self._commands.pop(0)[0]})
            return
        self._on_event({"event": "ended", "code": code, "message": message if code else ""})
        if code in FINAL_CODES or self._stopping:
            self.code = code
        elif code == PREEMPTED:
            self._next_start = time.monotonic() + PREEMPTED_DELAY
        else:
            self._crashes += 1
            self._next_start = time.monotonic() + RETRY_DELAY
            if self._crashes > self._retries:
                self.code = code


def combined_exit_code(codes: Sequence[int]) -> int:
    """Combines the exit codes of a job's processes: 2 and 3 take precedence, then those of crashes, then 75."""
    codes = [code if code >= 0 else 128 - code for code in codes]  # signals as a shell reports them
    for final in (2, 3):
        if final in codes:
            return final
    crashed = [code for code in codes if code not in (0, PREEMPTED)]
    # A process killed by a signal, which has the larger code, is the cause of its peers' exit codes.
    return max(crashed, default=max(codes))


def _multihost_flags(count: int) -> list[list[str]]:
    """Returns the flags for each of `count` processes that connect to each other on this machine."""
    if count == 1:
        return [[]]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    return [[coordinator, f"--num_processes={count}", f"--process_id={rank}"] for rank in range(count)]
