"""Locks on folders: a second holder is refused, and what a dead process leaves behind is no obstacle."""

import errno
import subprocess
import sys

import pytest

from diffusion.core import locks
from tests.refusals import refused

HOLDER = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, 2); print('held', flush=True); input()"


def test_a_second_holder_is_refused_until_the_first_is_dead(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / locks.NAME)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n" and locks.is_held(str(tmp_path))
        with refused("workdir"):
            locks.hold(str(tmp_path), "workdir")
        first.kill()
    assert (tmp_path / locks.NAME).exists() and not locks.is_held(str(tmp_path))
    with locks.hold(str(tmp_path), "workdir"):
        assert locks.is_held(str(tmp_path))


def test_a_lock_that_is_passed_on_is_shared_for_its_folder_only(tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    with locks.hold(str(one), "workdir") as lock, locks.hold(str(other), "workdir"):
        for name, value in locks.passed(lock).items():
            monkeypatch.setenv(name, value)
        with locks.hold(str(one), "workdir"):
            assert locks.is_held(str(one))
        with refused("workdir"):
            locks.hold(str(other), "workdir")


def test_a_lock_may_be_removed_with_its_file(tmp_path):
    locks.release(locks.hold(str(tmp_path), "workdir"))
    assert not list(tmp_path.iterdir())
    with locks.hold(str(tmp_path), "workdir"):
        assert locks.is_held(str(tmp_path))


@pytest.mark.parametrize("number", ["9999", "0", "x"])
def test_a_descriptor_that_is_no_lock_of_the_folder_is_ignored(tmp_path, monkeypatch, number):
    monkeypatch.setenv(locks.PASSED, number)
    with locks.hold(str(tmp_path), "workdir"):
        assert locks.is_held(str(tmp_path))


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def flock(file, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    monkeypatch.setattr(locks.logger, "propagate", True)
    with locks.hold(str(tmp_path), "workdir"):
        assert not locks.is_held(str(tmp_path))
    assert "cannot be locked" in caplog.text
