"""A folder that one at a time works in: a lock that ends with the last process that has it, however that ends."""

import contextlib
import fcntl
import os
import time
from typing import IO

from diffusion.core.types import InputError

NAME = "lock"
TRIES, PAUSE = 4, 0.05


def hold(folder: str, field: str) -> IO:
    """Takes the lock of a folder that exists; it is given back when the file is closed here and in all child processes
    that have inherited it.

    Raises:
      InputError: naming `field`, if another has it.
    """
    file = open(os.path.join(folder, NAME), "a")  # noqa: SIM115
    for _ in range(TRIES):
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        time.sleep(PAUSE)  # who looks whether it is held has it for that long
    file.close()
    raise InputError(field, f"{folder} is in use by another; wait for it, or give another")


def is_held(folder: str) -> bool:
    """Whether somebody works in a folder."""
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
