"""Writes files atomically or line by line, on a local disk or in remote storage such as `gs://bucket/run`.

If a job has several processes, only the first writes.
"""

import contextlib
import errno
import hashlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO

import jax
from etils import epath

from diffusion.core.types import InputError

Path = str | os.PathLike[str]

REWRITE = 60.0  # minimum time in seconds between two uploads of a remote file that grows by lines


def writes() -> bool:
    """Returns whether this process writes files. Does not initialize the devices if there is only one process."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_remote(path: Path) -> bool:
    """Returns whether a path is a URL such as `gs://bucket/run`."""
    return "://" in os.fspath(path)


def make_folder(path: Path, field: str) -> str:
    """Creates an output folder and returns its path.

    Raises:
      InputError: Nothing can be written there; the error names `field`.
    """
    path = os.fspath(path)
    try:
        if is_remote(path):
            epath.Path(path).mkdir(parents=True, exist_ok=True)
            return path
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise InputError(field, f"{path} cannot be written: {error.strerror or error}") from error


def is_folder(path: Path, field: str) -> bool:
    """Returns whether the folder exists.

    Raises:
      InputError: The storage cannot be reached; the error names `field`.
    """
    try:
        return epath.Path(path).is_dir()
    except Exception as error:  # each storage backend raises its own exceptions
        missing = "; pip install gcsfs" if isinstance(error, ImportError) else ""
        raise InputError(field, f"{path} cannot be reached: {error}{missing}") from error


@contextlib.contextmanager
def replace(path: Path, mode: str = "w") -> Iterator[IO]:
    """Opens a temporary file that replaces `path` when the context ends without an exception."""
    path = os.fspath(path)
    encoding = None if "b" in mode else "utf-8"
    if not writes():
        yield io.BytesIO() if "b" in mode else io.StringIO()  # not os.devnull, in which zipfile cannot seek
        return
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, "file")
            with open(local, mode, encoding=encoding) as file:
                yield file
            epath.Path(local).copy(path, overwrite=True)
        return
    partial = f"{path}.partial"
    try:
        with open(partial, mode, encoding=encoding) as file:
            yield file
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with epath.Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lines:
    """A text file that grows line by line.

    A local file contains each line as soon as it is added. A remote file can only be written as a whole, so it is
    uploaded about once a minute and when it is closed.

    Args:
      path: The file, which may exist.

    Raises:
      OSError: From every method, if writing fails or if the file has been removed in the meantime.
    """

    def __init__(self, path: Path):
        self.path, self._file, self._lines = os.fspath(path), None, []
        self.keep(lambda line: True)

    def keep(self, predicate: Callable[[str], bool]) -> None:
        """Removes the lines for which `predicate` is False, and an incomplete last line."""
        self.close()
        path = epath.Path(self.path)
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        lines = text.splitlines(keepends=True)
        self._lines = [line for line in lines if line.endswith("\n") and predicate(line)]
        if len(self._lines) < len(lines):
            self._rewrite()
        if not is_remote(self.path):
            self._lines.clear()
            self._file = open(self.path if writes() else os.devnull, "a", encoding="utf-8")  # noqa: SIM115
        self._written = time.monotonic()

    def add(self, line: str) -> None:
        """Adds a line, given without its newline."""
        if self._file is not None:
            if not os.fstat(self._file.fileno()).st_nlink:  # without this, the lines would go to an unlinked file
                raise FileNotFoundError(errno.ENOENT, "was removed", self.path)
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._lines.append(line + "\n")
        if time.monotonic() - self._written > REWRITE:
            self._rewrite()
            self._written = time.monotonic()

    def close(self) -> None:
        """Writes all lines and closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        elif self._lines:
            self._rewrite()
            self._lines.clear()

    def _rewrite(self) -> None:
        with replace(self.path) as file:
            file.writelines(self._lines)
