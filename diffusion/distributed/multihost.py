"""Several processes of one job, each with devices of its own."""

import os
import re
import sys

import jax
import numpy as np
from jax._src import distributed  # whose barriers have a limit; jax.experimental.multihost_utils has none
from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize finds out by itself and tells nobody
from jax.experimental import multihost_utils

from diffusion.core.types import InputError
from diffusion.distributed import roll_call
from diffusion.distributed.roll_call import Missing

HEARTBEAT = 30  # seconds of silence after which a process counts as dead, and ends the others
LOST = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|CoordinationService")  # in what JAX raises then
TOGETHER = 300  # seconds that a process waits for the others, at the start, at a barrier, at the end


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of a job; before anything else touches a device.

    Args:
      coordinator: HOST:PORT of process 0, the same in all; with None the environment tells of all three: that of
        Slurm, Open MPI, GKE or a TPU VM.
      num_processes: how many there are.
      process_id: which this is, from 0.

    Raises:
      InputError: they do not go together, or the environment does not tell.
      Missing: some have not come.
    """
    if coordinator is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError("--coordinator", f"must be HOST:PORT, as in 127.0.0.1:1234, got {coordinator!r}")
        if num_processes < 1:
            raise InputError("--num_processes", f"must be at least 1, got {num_processes}")
        if not 0 <= process_id < num_processes:
            raise InputError("--process_id", f"must be from 0 to {num_processes - 1}, got {process_id}")
    else:
        coordinator, num_processes, process_id = _told()
    print(f"process {process_id} of {num_processes} waits at {coordinator} for the others, {TOGETHER} s at most",
          file=sys.stderr)  # fmt: skip
    roll_call.call(coordinator, num_processes, process_id, TOGETHER)
    # It would take SIGTERM from training/preemption.py, to save a step that Orbax chooses.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator, num_processes, process_id, initialization_timeout=TOGETHER,
        heartbeat_timeout_seconds=HEARTBEAT, shutdown_timeout_seconds=TOGETHER,
    )  # fmt: skip


def _told() -> tuple[str, int, int]:
    """What the environment says of coordinator, number of processes and this one's id."""
    problem = "the environment does not tell of other processes; give --coordinator, --num_processes and --process_id"
    try:
        told = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, TOGETHER
        )[:3]
    except (ValueError, RuntimeError) as error:  # it tells half of it, or of a host that nobody knows
        raise InputError("--distributed", f"{problem} ({error})") from error
    if None in told:
        raise InputError("--distributed", problem)
    return told


def is_announced() -> bool:
    """Whether the environment says that this is one of several processes: Slurm's srun, or GKE with TPUs."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
    return tasks not in ("", "1") or "," in hosts or slices not in ("", "1")


def is_loss(error: BaseException | None) -> bool:
    """Whether an error, or what it comes from, says that another process of the job has left."""
    while error is not None and jax.distributed.is_initialized():
        if LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def wait_for_all(what: str) -> None:
    """Until every process has come here.

    Raises:
      Missing: names those that have not, after TOGETHER seconds.
    """
    if jax.process_count() == 1:
        return
    client = distributed.global_state.client
    try:
        client.wait_at_barrier(f"diffusion: {what}", 1000 * TOGETHER)
    except jax.errors.JaxRuntimeError as error:
        late = re.findall(r"^\d+$", str(error).partition("timed out task names:")[2], re.MULTILINE)
        if not late:  # one is lost, and that is what it says
            raise
        raise Missing(
            f"process {', '.join(sorted(late, key=int))} did not come to {what!r} within {TOGETHER} s"
        ) from error


def agreed(answer: bool) -> bool:
    """What the first process answers: the files that all look at may have changed before the last looks."""
    return bool(multihost_utils.broadcast_one_to_all(np.bool_(answer))) if jax.process_count() > 1 else answer
