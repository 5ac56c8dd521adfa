"""Jobs of several processes, each with its own devices."""

import contextlib
import logging
import os
import re
import threading
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion.core import files, locks
from diffusion.core.types import InputError
from diffusion.distributed import jax_internals, roll_call
from diffusion.distributed.roll_call import Missing

LEAVE_TIMEOUT = 10  # seconds that a process which ends with an error waits for the others to end
HEARTBEAT_TIMEOUT = 30  # seconds of silence after which a process counts as dead and the others are ended
LOST = re.compile("Gloo|NCCL|UNAVAILABLE|DEADLINE_EXCEEDED|CoordinationService")  # in the errors that JAX raises then
TIMEOUT = 300  # seconds that a process waits for the others: at the start, at a barrier and at the end

logger = logging.getLogger(__name__)


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Connects the processes of a job; call it before anything uses a device.

    A roll call comes first, because `jax.distributed.initialize` cannot report which process is missing.

    Args:
      coordinator: HOST:PORT of process 0, the same in all processes. If None, all three are detected from the
        environment of Slurm, Open MPI, GKE or a TPU VM.
      num_processes: The number of processes.
      process_id: The index of this process, from 0.

    Raises:
      InputError: The arguments are inconsistent, or the environment does not describe the job.
      Missing: Some processes did not join in time.
    """
    if coordinator is None:
        coordinator, num_processes, process_id = _detected()
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
            raise InputError("--coordinator", f"must be HOST:PORT, for example 127.0.0.1:1234, got {coordinator!r}")
        if num_processes < 1:
            raise InputError("--num_processes", f"must be at least 1, got {num_processes}")
        if not 0 <= process_id < num_processes:
            raise InputError("--process_id", f"must be from 0 to {num_processes - 1}, got {process_id}")
    if coordinator is None:
        logger.info("no roll call: this version of JAX does not report the processes that it detects")
    else:
        logger.info("process %d of %d waits at %s for the others, up to %d s", process_id, num_processes, coordinator,
                    TIMEOUT)  # fmt: skip
        roll_call.call(coordinator, num_processes, process_id, TIMEOUT)
    # JAX's preemption service would take SIGTERM from training/resilience/preemption.py and let Orbax choose the step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=TIMEOUT,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT, shutdown_timeout_seconds=TIMEOUT,
        )  # fmt: skip
    except ValueError as error:
        if coordinator is not None:
            raise
        raise _undetected(error) from error


def _detected() -> tuple[str | None, int | None, int | None]:
    """Returns the coordinator, the process count and this process's id; None thrice if JAX detects them by itself."""
    try:
        detected = jax_internals.detect_cluster(TIMEOUT)
    except (ValueError, RuntimeError) as error:  # the environment is incomplete, or names an unknown host
        raise _undetected(error) from error
    if detected is None:
        return None, None, None
    if None in detected:
        raise _undetected()
    return detected


def _undetected(error: Exception | None = None) -> InputError:
    problem = "the environment describes no job of several processes"
    advice = "give --coordinator, --num_processes and --process_id"
    return InputError("--distributed", f"{problem}; {advice}" + (f" ({error})" if error else ""))


def is_announced() -> bool:
    """Returns whether the environment says that this is one of several processes (Slurm's srun, or GKE with TPUs)."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
    return tasks not in ("", "1") or "," in hosts or slices not in ("", "1")


def is_loss(error: BaseException | None) -> bool:
    """Returns whether an error, or a cause of it, says that another process of the job was lost."""
    while error is not None and jax.distributed.is_initialized():
        if LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def wait_for_all(what: str) -> None:
    """Waits until every process has called this function with the same `what`.

    Raises:
      Missing: Some processes, which the message names, have not called it after `TIMEOUT` seconds.
    """
    if jax.process_count() == 1:
        return
    try:
        jax_internals.wait_at_barrier(f"diffusion: {what}", TIMEOUT)
    except jax.errors.JaxRuntimeError as error:
        late = re.findall(r"^\d+$", str(error).partition("timed out task names:")[2], re.MULTILINE)
        if not late:  # a process was lost, and the error says so
            raise
        names = ", ".join(sorted(late, key=int))
        raise Missing(f"process {names} did not reach the barrier {what!r} within {TIMEOUT} s") from error


def leave() -> None:
    """Disconnects this process before it ends with an error, at the same time as the others if they end too.

    JAX aborts a process that is connected while another ends without this. If the error is of this process alone, the
    others do not end, so they are waited for only briefly.
    """
    if jax.distributed.is_initialized():
        thread = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        thread.start()
        thread.join(LEAVE_TIMEOUT)


@contextlib.contextmanager
def locked(folder: str, field: str, *, remove: bool = False) -> Iterator[None]:
    """Makes a folder and locks it for this job, whose first process holds the lock. Remote storage has no locks.

    Args:
      folder: The folder.
      field: Named by errors.
      remove: Whether to remove the file of the lock at the end.

    Raises:
      InputError: In every process, if another job holds the lock or the folder cannot be written.
    """
    lock, problem = None, None
    if files.writes() and not files.is_remote(folder):
        try:
            lock = locks.hold(files.make_folder(folder, field), field)
        except InputError as error:
            problem = error
    if broadcast_from_first(problem is not None):
        raise problem or InputError(field, f"{folder} is in use or cannot be written")
    try:
        yield
    finally:
        if lock:
            locks.release(lock) if remove else lock.close()


def summed(x: np.ndarray) -> np.ndarray:
    """Returns the sum of the float64 arrays of all processes, in float64, which is more than JAX has by default."""
    if jax.process_count() == 1:
        return x
    return multihost_utils.process_allgather(x.view(np.uint32)).view(np.float64).sum(axis=0)


def broadcast_from_first(answer: int) -> int:
    """Returns the answer of the first process.

    Use it for questions about files, which may have changed before the last process looks at them.
    """
    return int(multihost_utils.broadcast_one_to_all(np.int32(answer))) if jax.process_count() > 1 else answer
