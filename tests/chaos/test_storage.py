"""Storage that is full, read-only or removed, and clocks that are wrong."""

import os
import re
import shutil

import numpy as np
import pytest

from experiments.cli import BAD_INPUT
from tests import disks
from tests.chaos.config import EVERY, STEPS
from tests.chaos.training import Training, committed, outcome


@pytest.fixture
def disk(tmp_path):
    """A small separate file system, and a function that changes its size."""
    with disks.mounted(tmp_path / "disk", "16m") as change:
        yield tmp_path / "disk", lambda size: change(f"size={size}")


def ends_with_one_line(training):
    assert training.wait() == [BAD_INPUT], training.output()
    output = training.output()
    assert "Traceback" not in output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture(scope="module")
def whole(compiled, tmp_path_factory):
    training = Training("denoising", tmp_path_factory.mktemp("whole") / "run", 1, compiled=compiled)
    assert training.wait() == [0], training.output()
    return outcome(training.workdir)


def resumes(start, workdir, whole, step):
    """Resumes a run from a step, and compares its end with that of the uninterrupted run."""
    training = start("denoising", workdir, 1)
    assert training.wait() == [0] and f"resuming from step {step}" in training.output(), training.output()
    (arrays, *rest), (found, *others) = whole, outcome(workdir)
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert others == rest


@pytest.mark.slow
def test_a_full_disk(start, disk, whole):
    folder, change = disk
    training = start("denoising", folder / "run", 1, pace=0.05)
    training.until_doing(f"step {2 * EVERY + 1}")
    disks.fill(folder)
    assert re.search("No space left", line := ends_with_one_line(training)), line
    step = committed(folder / "run")
    assert step and step % EVERY == 0
    # A restart on the full disk reports the same, and changes nothing.
    assert re.search("No space left", line := ends_with_one_line(start("denoising", folder / "run", 1))), line
    assert committed(folder / "run") == step
    change("64m")
    resumes(start, folder / "run", whole, step)


@pytest.mark.chaos
def test_a_folder_that_becomes_read_only(start, tmp_path, whole):
    # The superuser may write to every folder, so this capability is dropped.
    bound = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    run = tmp_path / "run"
    training = start("denoising", run, 1, before=bound, pace=0.05)
    training.until_doing(f"step {2 * EVERY + 1}")
    (run / "checkpoints").chmod(0o555)
    assert "Permission denied" in ends_with_one_line(training)
    step = committed(run)
    assert "Permission denied" in ends_with_one_line(start("denoising", run, 1, before=bound))
    (run / "checkpoints").chmod(0o755)
    resumes(start, run, whole, step)


@pytest.mark.chaos
def test_a_folder_that_is_removed(start, tmp_path):
    training = start("denoising", tmp_path / "run", 1, pace=0.05)
    training.until_doing(f"step {EVERY + 2}")
    while (tmp_path / "run").exists():  # a save in progress may create files again
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
    line = ends_with_one_line(training)  # Orbax has many words for it
    assert re.search("was removed|No such file|does not exist|cannot save a checkpoint", line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.chaos
def test_a_clock_that_goes_backwards(start, tmp_path, whole):
    training = start("denoising", tmp_path / "run", 1, clock=-3600)
    assert training.wait() == [0], training.output()
    (arrays, *rest), (found, *others) = whole, outcome(tmp_path / "run")
    for name, value in arrays.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    assert others == rest and committed(tmp_path / "run") == STEPS
