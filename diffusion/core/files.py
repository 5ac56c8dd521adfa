"""Writing files: whole or not at all, or line by line; on a local disk or at a place such as `gs://bucket/run`; by the
first process alone, where a job has several."""

import contextlib
import errno
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import IO

import jax
from etils import epath

from diffusion.core.types import InputError

REWRITE = 60.0  # seconds between two writings of a remote file's lines


def writes() -> bool:
    """Whether this process is the one that writes. It does not wake the devices up where there is one process."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in str(path)


def make_folder(path: str, field: str) -> str:
    """Makes a folder for output, and returns it. Raises InputError naming `field` if nothing can be written there."""
    try:
        if is_remote(path):
            epath.Path(path).mkdir(parents=True, exist_ok=True)
            return path
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise InputError(field, f"{path} cannot be written: {error.strerror or error}") from error


def is_folder(path: str | os.PathLike, field: str) -> bool:
    """Whether there is such a folder. Raises InputError naming `field` if it cannot be known."""
    try:
        return epath.Path(path).is_dir()
    except Exception as error:  # each kind of storage raises its own
        missing = "; pip install gcsfs" if isinstance(error, ImportError) else ""
        raise InputError(field, f"{path} cannot be reached: {error}{missing}") from error


@contextlib.contextmanager
def replace(path: str, mode: str = "w") -> Iterator[IO]:
    """Opens a file that takes the place of `path` at the end, unless something was raised."""
    encoding = None if "b" in mode else "utf-8"
    if not writes():
        yield io.BytesIO() if "b" in mode else io.StringIO()  # not the null device, where an archive cannot seek
        return
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            whole = os.path.join(folder, "whole")
            with open(whole, mode, encoding=encoding) as file:
                yield file
            epath.Path(whole).copy(path, overwrite=True)
        return
    partial = f"{path}.partial"
    try:
        with open(partial, mode, encoding=encoding) as file:
            yield file
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


class Lines:
    """A text file that grows by lines. On a local disk each is there once it is added; a remote file, which can only be
    written whole, has them a minute later, or when it is closed.

    Args:
      path: of the file, which may exist.

    Raises:
      OSError: from every method, as writing does; also where the file was removed meanwhile.
    """

    def __init__(self, path: str):
        self.path, self._file, self._lines = path, None, []
        self.keep(lambda line: True)

    def keep(self, wanted: Callable[[str], bool]) -> None:
        """Removes all other lines, and one that a kill has cut short."""
        self.close()
        there = epath.Path(self.path)
        text = there.read_bytes().decode(errors="replace") if there.exists() else ""
        lines = text.splitlines(keepends=True)
        self._lines = [line for line in lines if line.endswith("\n") and wanted(line)]
        if len(self._lines) < len(lines):
            self._rewrite()
        if not is_remote(self.path):
            self._lines.clear()
            self._file = open(self.path if writes() else os.devnull, "a", encoding="utf-8")  # noqa: SIM115
        self._written = time.monotonic()

    def add(self, line: str) -> None:
        """Adds a line, given without its end."""
        if self._file is not None:
            if not os.fstat(self._file.fileno()).st_nlink:  # or it would grow where nobody can see it
                raise FileNotFoundError(errno.ENOENT, "was removed", self.path)
            self._file.write(line + "\n")
            self._file.flush()
            return
        self._lines.append(line + "\n")
        if time.monotonic() - self._written > REWRITE:
            self._rewrite()
            self._written = time.monotonic()

    def close(self) -> None:
        """Ends the writing, with all lines in the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        elif self._lines:
            self._rewrite()
            self._lines.clear()

    def _rewrite(self) -> None:
        with replace(self.path) as file:
            file.writelines(self._lines)
