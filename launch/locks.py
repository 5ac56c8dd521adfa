"""Locks on folders. A lock is released when the last process that holds it ends, however that process ends."""

import contextlib
import fcntl
import os
import time
from typing import IO

from diffusion.core.types import InputError

NAME = "lock"
TRIES, RETRY_DELAY = 4, 0.05  # RETRY_DELAY in seconds


def hold(folder: str, field: str) -> IO:
    """Locks an existing folder.

    The lock is released once the returned file is closed here and in every child process that inherited it.

    Raises:
      InputError: Another process holds the lock; the error names `field`.
    """
    file = open(os.path.join(folder, NAME), "a")  # noqa: SIM115
    for _ in range(TRIES):
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        time.sleep(RETRY_DELAY)  # `is_held` takes a shared lock for a moment
    file.close()
    raise InputError(field, f"{folder} is in use by another process; wait for it to end, or choose another folder")


def is_held(folder: str) -> bool:
    """Returns whether a process holds the lock of a folder."""
    try:
        with open(os.path.join(folder, NAME)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
    except OSError:
        pass
    return False
