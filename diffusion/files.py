"""Writing files that are there whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import IO

from diffusion.types import InputError


def make_folder(path: str, field: str) -> str:
    """Makes a folder for output, and returns it. Raises InputError naming `field` if nothing can be written there."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise InputError(field, f"{path} cannot be written: {error.strerror}") from error


@contextlib.contextmanager
def replace(path: str, mode: str = "w") -> Iterator[IO]:
    """Opens a file beside `path` that takes its place at the end, unless something was raised."""
    partial = f"{path}.partial"
    try:
        with open(partial, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
