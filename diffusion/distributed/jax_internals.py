"""The private interfaces of JAX that the project uses, each with a public fallback.

JAX may move or remove them in any release. Without them the project loses error messages that name the missing
processes, and no other function.
"""

import os

from jax.experimental import multihost_utils

try:
    from jax._src.clusters import ClusterEnv
except ImportError:
    ClusterEnv = None
try:
    from jax._src.distributed import global_state
except ImportError:
    global_state = None


def detect_cluster(timeout: int) -> tuple[str | None, int | None, int | None] | None:
    """Returns what `jax.distributed.initialize()` would detect: the coordinator, the process count and the process id.

    An entry is None if the environment does not define it. Returns None if this version of JAX has no such interface.

    Args:
      timeout: Seconds to wait for the host of process 0 to be known.

    Raises:
      ValueError, RuntimeError: The environment is incomplete.
    """
    detect = getattr(ClusterEnv, "auto_detect_unset_distributed_params", None)
    if detect is None:
        return None
    try:
        return detect(os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, timeout)[:3]
    except TypeError:  # its parameters have changed
        return None


def wait_at_barrier(name: str, timeout: int) -> None:
    """Waits until every process has reached the barrier `name`.

    Args:
      name: The same in all processes.
      timeout: Seconds to wait. The public fallback, `sync_global_devices`, has no time limit.

    Raises:
      jax.errors.JaxRuntimeError: The time is over (the message lists the late processes), or a process was lost.
    """
    client = getattr(global_state, "client", None)
    if hasattr(client, "wait_at_barrier"):
        client.wait_at_barrier(name, 1000 * timeout)
    else:
        multihost_utils.sync_global_devices(name)
