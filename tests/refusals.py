"""Helpers that check which field an error message names, independent of its wording."""

import contextlib
import subprocess
from collections.abc import Iterator

import pytest

from diffusion.core.types import InputError


@contextlib.contextmanager
def refused(field: str) -> Iterator[pytest.ExceptionInfo]:
    """Expects the block to raise an InputError that names `field`; `refused("")` accepts any field."""
    with pytest.raises(InputError) as caught:
        yield caught
    assert field in ("", caught.value.field), f"the error names another field: {caught.value}"


def refused_field(done: subprocess.CompletedProcess) -> str:
    """Returns the field named by a job that ended with exit code 2 and a single line `error: FIELD: ...`."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0].removeprefix("error: ").partition(": ")[0]
