"""Fixtures that start trainings."""

import os

import pytest

from tests.chaos.training import Training

FULL = int(os.environ.get("CHAOS", 0))  # number of kills of each case in `make chaos`


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return os.environ.get("JAX_COMPILATION_CACHE_DIR") or tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def teachers(tmp_path_factory, compiled):
    """A folder of trained models for the cases that need a teacher."""
    folder = tmp_path_factory.mktemp("teachers")
    if FULL:
        for name in ("eps", "v", "velocity"):
            assert Training(name, folder / name, 1, compiled=compiled).wait() == [0]
    return folder


@pytest.fixture
def start(compiled, teachers):
    """`start(case, workdir, processes, ...)` starts a `Training` that ends with the test."""
    started = []

    def run(*args, **keywords):
        started.append(Training(*args, compiled=compiled, teachers=teachers, **keywords))
        return started[-1]

    yield run
    for training in started:
        training.kill()
