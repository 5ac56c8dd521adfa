"""Runs jobs on this machine."""

import dataclasses
import shlex
from typing import IO

from diffusion.core import checks
from launch.jobs import Job
from launch.processes import JobProcesses


@dataclasses.dataclass(frozen=True)
class Local:
    """A launcher for this machine; see `make`."""

    num_processes: int
    gpus: int | None

    def start(
        self, command: tuple[str, ...], slot: int = 0, log: str | None = None, lock: IO | None = None
    ) -> JobProcesses:
        """Starts a command once; see `JobProcesses`.

        Args:
          command: The words after `python -m`.
          slot: Index of the job among those that run at the same time. It selects the GPUs.
          log: File to which the output is appended.
          lock: A lock of `core.locks` that the processes share.
        """
        return JobProcesses(command, [self._environment(slot, rank) for rank in range(self.num_processes)], log, lock)

    def format_command(self, job: Job) -> str:
        """Returns the shell command that corresponds to one start of a job."""
        variables = " ".join(f"{name}={value}" for name, value in self._environment(0, 0).items())
        line = shlex.join(["python", "-m", *job.command])
        if self.num_processes > 1:
            line += f" --coordinator=127.0.0.1:PORT --num_processes={self.num_processes} --process_id=0"
            line += f"  # and so on up to {self.num_processes - 1}"
        return f"$ {variables} {line}" if variables else f"$ {line}"

    def _environment(self, slot: int, rank: int) -> dict[str, str]:
        if self.gpus is None:
            return {}
        first = (slot * self.num_processes + rank) * self.gpus
        return {"CUDA_VISIBLE_DEVICES": ",".join(str(first + gpu) for gpu in range(self.gpus))}


def make(num_processes: int = 1, gpus: int | None = None) -> Local:
    """Returns a launcher that runs jobs as processes of this machine.

    Args:
      num_processes: Number of processes per job. They connect over the loopback interface.
      gpus: Number of GPUs per process. Processes and concurrent jobs get different GPUs. By default every process
        sees all GPUs.

    Raises:
      InputError: A number is below 1.
    """
    checks.at_least(1, num_processes=num_processes, gpus=gpus)
    return Local(num_processes, gpus)
