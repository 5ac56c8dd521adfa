"""Runs jobs as a user does, each in a separate process, and returns their output and exit codes.

The processes are forked from one that has imported everything, because imports take most of the time of a short job.
"""

import atexit
import contextlib
import importlib
import multiprocessing.forkserver
import os
import pathlib
import pkgutil
import runpy
import subprocess
import sys
import tempfile

import jax
import pytest

import diffusion

ROOT = pathlib.Path(__file__).parent.parent
# The jobs themselves must not be imported in advance, because they define their flags on import.
IMPORTED = [module.name for module in pkgutil.walk_packages(diffusion.__path__, "diffusion.")]
IMPORTED += ["diffusion.pipelines.comparison", "diffusion.pipelines.generator", "tests.jobs"]


def job(name, *flags, read=True, constants=None, **variables):
    """Runs `python -m experiments.NAME FLAGS` on one device, in the root of the repository.

    Args:
      name: The job; one with dots is that of a module outside `experiments`.
      read: Whether the standard output is read; otherwise it is a pipe that nobody reads.
      constants: Other values of constants by their full names, which make a long job short.
      **variables: Environment variables.
    """
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT), **variables}
    context = multiprocessing.get_context("forkserver")
    with pytest.MonkeyPatch.context() as patch:  # JAX reads its environment on import, which happens in the fork server
        for key in ("JAX_NUM_CPU_DEVICES", "PYTHONPATH"):
            patch.setenv(key, environment[key])
        context.set_forkserver_preload(IMPORTED)
        multiprocessing.forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        streams = [pathlib.Path(folder) / stream for stream in ("stdout", "stderr")]
        for path in streams:
            path.touch()
        process = context.Process(target=_run, args=(name, flags, environment, streams, read, constants or {}))
        process.start()
        process.join()
        stdout, stderr = (path.read_text() for path in streams)
    return subprocess.CompletedProcess([name, *flags], process.exitcode, stdout, stderr)


def one_line(done):
    """Returns the only line of standard error of a job that ended with exit code 2."""
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


def children(pid):
    """Returns the ids of a process's children in increasing order."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process may have ended
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return sorted(found)


def _run(name, flags, environment, streams, read, constants):
    for number, path in enumerate(streams, start=1):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    if not read:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
    jax.config.update("jax_platforms", environment["JAX_PLATFORMS"])  # JAX has been imported already
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    with contextlib.ExitStack() as stack:
        stack.callback(atexit._run_exitfuncs)  # multiprocessing skips exit handlers
        start(name, flags, constants)


def start(name, flags, constants):
    """Runs a job in this process; see `job`."""
    for path, value in constants.items():
        module, _, constant = path.rpartition(".")
        setattr(importlib.import_module(module), constant, value)
    sys.argv = [name, *flags]
    runpy.run_module(name if "." in name else f"experiments.{name}", run_name="__main__", alter_sys=True)
