"""Writes files atomically or line by line, on a local disk or in remote storage such as `gs://bucket/run`.

If a job has several processes, only the first writes.
"""

import contextlib
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any

import jax
from etils import epath

from diffusion.core.types import InputError

Path = str | os.PathLike[str]

UNWRITABLE = re.compile("No space left on device|Disk quota exceeded|Read-only file system|Permission denied")
REWRITE = 60.0  # minimum time in seconds between two uploads of a remote file that grows by lines


def writes() -> bool:
    """Returns whether this process writes files. Does not initialize the devices if there is only one process."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def is_remote(path: Path) -> bool:
    """Returns whether a path is a URL such as `gs://bucket/run`."""
    return "://" in os.fspath(path)


def make_folder(path: Path, field: str, size: int = 0, less: str = "write less") -> str:
    """Creates an output folder and returns its path.

    Args:
      size: Number of bytes that are known to be written there.
      less: What to do if there is no space for them, for the error.

    Raises:
      InputError: Nothing can be written there, or not as much; the error names `field`.
    """
    path = os.fspath(path)
    is_new = not is_remote(path) and not os.path.exists(path)
    with writing(path, field):
        if is_remote(path):
            epath.Path(path).mkdir(parents=True, exist_ok=True)
            return path
        os.makedirs(path, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(b"0")
        except OSError:
            if is_new:
                os.rmdir(path)
            raise
    free = shutil.disk_usage(path).free
    if size > free:
        if is_new:
            os.rmdir(path)
        problem = f"{path} needs {size / 2**20:,.1f} MiB, and {free / 2**20:,.1f} MiB are free"
        raise InputError(field, f"{problem}; free some, or {less}")
    return path


@contextlib.contextmanager
def new_folder(path: Path, field: str, size: int = 0) -> Iterator[str]:
    """Yields a temporary folder that becomes `path` when the context ends; after an exception it is removed.

    Args:
      path: A folder that does not exist or is empty. A remote one is written in place.
      size: See `make_folder`.

    Raises:
      InputError: It cannot be written; the error names `field`.
    """
    path = os.fspath(path)
    if is_remote(path):
        yield make_folder(path, field)
        return
    path = os.path.abspath(path)
    parent = make_folder(os.path.dirname(path), field, size)
    with writing(path, field), tempfile.TemporaryDirectory(dir=parent, prefix=".partial-") as folder:
        partial = os.path.join(folder, os.path.basename(path))
        os.mkdir(partial)
        try:
            yield partial
        except InputError as error:
            if partial not in error.problem:
                raise
            raise InputError(field, error.problem.replace(partial, path)) from error
        os.replace(partial, path)


@contextlib.contextmanager
def writing(path: Path, field: str) -> Iterator[None]:
    """Turns an error of writing to `path` into an InputError that names `field`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        known = UNWRITABLE.search(str(error))  # libraries raise their own errors
        if not known and not isinstance(error, OSError):
            raise
        reason = known[0] if known else error.strerror or error
        raise InputError(field, f"{os.fspath(path)} cannot be written: {reason}") from error


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
def replace(path: Path, mode: str = "w", *, any_process: bool = False) -> Iterator[IO]:
    """Opens a temporary file that replaces `path` when the context ends without an exception.

    With `any_process`, every process of a job writes, and the caller sees to it that one does at a time.
    """
    path = os.fspath(path)
    # Names of files have escapes where the locale is not UTF-8; they are written as the bytes that they stand for.
    encoding, errors = (None, None) if "b" in mode else ("utf-8", "surrogateescape")
    if not any_process and not writes():
        yield io.BytesIO() if "b" in mode else io.StringIO()  # not os.devnull, in which zipfile cannot seek
        return
    if is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            local = os.path.join(folder, "file")
            with open(local, mode, encoding=encoding, errors=errors) as file:
                yield file
            epath.Path(local).copy(path, overwrite=True)
        return
    partial = f"{path}.partial"
    try:
        with open(partial, mode, encoding=encoding, errors=errors) as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or path  # a full disk is reported without it
        raise
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically; see `json_text`."""
    with replace(path) as file:
        file.write(json_text(value, indent=2))


def json_text(value: Any, **options: Any) -> str:
    """Returns a value as JSON; `options` are those of `json.dumps`."""
    return json.dumps(plain(value), allow_nan=False, **options)


def plain(value: Any) -> Any:
    """Returns a value as JSON can hold it, with arrays as lists and the numbers that JSON lacks as texts.

    These are "NaN", "Infinity" and "-Infinity", as in the JSON of protocol buffers. `pipelines.config.from_json` reads
    them.
    """
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, list):
        return plain(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


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
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                error.filename = self.path
                raise
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
