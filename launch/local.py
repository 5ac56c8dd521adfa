"""Jobs on this machine."""

import dataclasses
import shlex
from typing import IO

from diffusion.core.types import InputError
from launch.jobs import Job
from launch.processes import Start


@dataclasses.dataclass(frozen=True)
class Local:
    """See `make`."""

    num_processes: int
    gpus: int | None

    def start(self, command: tuple[str, ...], slot: int = 0, log: str | None = None, lock: IO | None = None) -> Start:
        """Starts a command once; `slot` counts the jobs that run beside each other. See `processes.Start`."""
        return Start(command, [self._environment(slot, number) for number in range(self.num_processes)], log, lock)

    def shown(self, job: Job) -> str:
        """What a start runs, as a shell has it."""
        told = " ".join(f"{name}={value}" for name, value in self._environment(0, 0).items())
        line = shlex.join(["python", "-m", *job.command])
        if self.num_processes > 1:
            line += f" --coordinator=127.0.0.1:PORT --num_processes={self.num_processes} --process_id=0"
            line += f"  # and on to {self.num_processes - 1}"
        return f"$ {told} {line}" if told else f"$ {line}"

    def _environment(self, slot: int, number: int) -> dict[str, str]:
        if self.gpus is None:
            return {}
        first = (slot * self.num_processes + number) * self.gpus
        return {"CUDA_VISIBLE_DEVICES": ",".join(str(first + gpu) for gpu in range(self.gpus))}


def make(num_processes: int = 1, gpus: int | None = None) -> Local:
    """Processes of this machine.

    Args:
      num_processes: of each job; they find each other on the loopback.
      gpus: of each process, those of jobs beside each other being different ones; all of them see all by default.
    """
    for name, value in (("num_processes", num_processes), ("gpus", gpus)):
        if value is not None and value < 1:
            raise InputError(name, f"must be at least 1, got {value}")
    return Local(num_processes, gpus)
