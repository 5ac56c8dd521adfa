"""Locks on local folders. A lock is released when the last process that holds it ends, however that process ends.

The operating system holds the lock, not the file named `lock`, which stays: that of a process which has ended is no
obstacle, also if it ended on another host that shares the folder.
"""

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import IO

from diffusion.core.types import InputError

NAME = "lock"
TRIES, RETRY_DELAY = 4, 0.05  # RETRY_DELAY in seconds
PASSED = "DIFFUSION_LOCK"  # the environment variable with the file descriptor of a lock that a parent process holds
IN_USE = (errno.EWOULDBLOCK, errno.EACCES)  # flock raises another error where there are no locks

logger = logging.getLogger(__name__)


def hold(folder: str, field: str) -> IO:
    """Locks an existing folder.

    The lock is released once the returned file is closed here and in every child process that inherited it. A child
    process with the environment of `passed` shares the lock of its parent.

    Raises:
      InputError: Another process holds the lock, or the folder cannot be written; the error names `field`.
    """
    path = os.path.join(folder, NAME)
    for _ in range(TRIES):
        try:
            file = _passed_to(path) or open(path, "a")  # noqa: SIM115
        except OSError as error:
            raise InputError(field, f"{folder} cannot be written: {error.strerror or error}") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                return file  # and not one that its holder has removed in the meantime
        except OSError as error:
            if error.errno not in IN_USE:
                logger.warning("%s cannot be locked (%s); start no second job in it", folder, error.strerror)
                return file
        file.close()
        time.sleep(RETRY_DELAY)  # `is_held` takes a shared lock for a moment
    raise InputError(field, f"{folder} is in use by another process; wait for it to end, or choose another folder")


@contextlib.contextmanager
def wait(folder: str) -> Iterator[None]:
    """Locks an existing folder, once no other process holds the lock. Does nothing where there are no locks."""
    with open(os.path.join(folder, NAME), "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def release(lock: IO) -> None:
    """Releases a lock, and removes its file. Do not use it for a lock that other processes share."""
    with contextlib.suppress(FileNotFoundError):  # the whole folder was removed
        os.remove(lock.name)
    lock.close()


def is_held(folder: str) -> bool:
    """Returns whether a process holds the lock of a folder."""
    try:
        with open(os.path.join(folder, NAME)) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno in IN_USE
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)
    except OSError:
        pass
    return False


def passed(lock: IO) -> Mapping[str, str]:
    """Returns the environment of a child process that inherits `lock` and may lock the same folder."""
    return {PASSED: str(lock.fileno())}


def _passed_to(path: str) -> IO | None:
    """Returns the file of the parent's lock if it is the one at `path`."""
    number = os.environ.get(PASSED, "")
    if not number.isdecimal():
        return None
    try:
        if not os.path.samestat(os.fstat(int(number)), os.stat(path)):
            return None
        os.set_inheritable(int(number), False)  # a child that outlives this process must not hold the lock
        return os.fdopen(os.dup(int(number)), "a")
    except OSError:  # a descriptor that this process did not inherit
        return None
