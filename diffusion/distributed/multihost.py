"""Several processes of one job, each with devices of its own."""

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion.types import InputError

HEARTBEAT = 30  # seconds of silence after which a process counts as dead, and ends the others
TOGETHER = 300  # seconds that a process waits for the others, at the start, at a barrier, at the end


def initialize(coordinator: str, num_processes: int, process_id: int) -> None:
    """Joins the processes of a job; before anything else touches a device.

    Args:
      coordinator: HOST:PORT of process 0, the same in all.
      num_processes: how many there are.
      process_id: which this is, from 0.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError("--coordinator", f"must be HOST:PORT, as in 127.0.0.1:1234, got {coordinator!r}")
    if num_processes < 1:
        raise InputError("--num_processes", f"must be at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise InputError("--process_id", f"must be from 0 to {num_processes - 1}, got {process_id}")
    # It would take SIGTERM from training/preemption.py, to save a step that Orbax chooses.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator, num_processes, process_id, initialization_timeout=TOGETHER, heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=TOGETHER,
    )  # fmt: skip


def wait_for_all(what: str) -> None:
    """Until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agreed(answer: bool) -> bool:
    """What the first process answers: the files that all look at may have changed before the last looks."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(answer))) if jax.process_count() > 1 else answer
