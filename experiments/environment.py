"""Handles the conditions of a job's environment: closed pipes, locales, full disks and missing accelerators."""

import io
import os
import sys

import jax

from diffusion.core import files

MOST_CHARACTERS = 300  # of a message of another library


class _Output(io.FileIO):
    """A stream of this process. What is written after its reader has ended, as after `| head`, is dropped."""

    def write(self, data) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)


def open_streams() -> None:
    """Lets every text be printed: unknown characters are escaped, and nobody has to read the output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # it was closed before the job started
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
            continue
        try:
            output = _Output(stream.fileno(), "w", closefd=False)
        except OSError:  # a test or a notebook has replaced the stream
            continue
        stream.flush()
        opened = io.TextIOWrapper(
            io.BufferedWriter(output), stream.encoding, "backslashreplace", line_buffering=stream.line_buffering
        )
        setattr(sys, name, opened)


def problem_of(error: Exception) -> str | None:
    """Returns in one line which problem of the environment an error stands for; None for any other error."""
    if isinstance(error, UnicodeEncodeError):
        return f"locale: {error}; set LC_ALL=C.UTF-8 or PYTHONUTF8=1"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror or error}"
    if files.UNWRITABLE.search(str(error)):  # libraries raise their own errors
        return str(error).partition("\n")[0][:MOST_CHARACTERS]
    return _problem_of_backend()


def _problem_of_backend() -> str | None:
    """Returns why the accelerators that the environment asks for cannot be used; None if they can."""
    wanted = jax.config.jax_platforms
    if not wanted:
        return None
    try:
        jax.devices()
    except Exception as error:  # for an absent plugin, JAX fails by an assertion without a message
        reason = str(error).partition("\n")[0][:MOST_CHARACTERS] or "there is no such backend"
        return f"JAX_PLATFORMS: {wanted!r} cannot be used here: {reason}; unset it, or set cpu"
    return None
