"""The private interfaces of JAX, and the fallbacks for a version without them."""

import importlib.util
import logging
import pathlib
import sys

import jax
import pytest

import diffusion
from diffusion.distributed import jax_internals, multihost, roll_call
from tests.refusals import refused

ROOT = pathlib.Path(diffusion.__file__).parent


def test_one_module_alone_uses_private_interfaces():
    users = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if "jax._src" in path.read_text()]
    assert users == ["distributed/jax_internals.py"]


def test_this_version_of_jax_has_them(monkeypatch):
    environment = {"JOB_ID": "7", "STEP_NODELIST": "localhost", "NTASKS": "3", "PROCID": "2", "LOCALID": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("JAX_COORDINATOR_PORT", "1234")
    assert jax_internals.detect_cluster(1) == ("localhost:1234", 3, 2)
    assert hasattr(jax_internals.global_state, "client")


@pytest.fixture
def without(monkeypatch):
    """The module as it is imported where JAX has none of the private names."""
    for name in ("distributed", "clusters"):
        monkeypatch.delattr(jax._src, name)
        monkeypatch.setitem(sys.modules, f"jax._src.{name}", None)
    spec = importlib.util.spec_from_file_location("jax_internals_without", jax_internals.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(multihost, "jax_internals", module)
    return module


@pytest.fixture
def initialized(monkeypatch):
    """The arguments of each call of `jax.distributed.initialize` and of the roll call."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: calls.append(("initialize", *args)))
    monkeypatch.setattr(roll_call, "call", lambda *args: calls.append(("roll call", *args[:3])))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    return calls


def test_without_them_jax_detects_the_cluster(without, initialized, caplog):
    assert without.detect_cluster(1) is None
    with caplog.at_level(logging.INFO, logger="diffusion"):
        multihost.initialize()
    assert initialized == [("initialize", None, None, None)] and "no roll call" in caplog.text


def test_without_them_flags_still_have_a_roll_call(without, initialized):
    multihost.initialize("localhost:1234", 2, 1)
    job = ("localhost:1234", 2, 1)
    assert initialized == [("roll call", *job), ("initialize", *job)]


def test_without_them_a_barrier_has_no_time_limit(without, monkeypatch):
    reached = []
    monkeypatch.setattr(without.multihost_utils, "sync_global_devices", reached.append)
    without.wait_at_barrier("saved", 1)
    assert reached == ["saved"]


def test_changed_parameters_count_as_missing(monkeypatch):
    class ClusterEnv:
        @staticmethod
        def auto_detect_unset_distributed_params():
            raise AssertionError

    monkeypatch.setattr(jax_internals, "ClusterEnv", ClusterEnv)
    assert jax_internals.detect_cluster(1) is None


def test_jax_detects_no_cluster(without, initialized, monkeypatch):
    def initialize(*args, **keywords):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with refused("--distributed"):
        multihost.initialize()
    with pytest.raises(ValueError, match="should be defined"):  # not a fault of the environment
        multihost.initialize("localhost:1234", 2, 1)
