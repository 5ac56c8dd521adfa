"""Checkpoints: what is saved and restored, and what is reported when files are corrupt."""

import dataclasses
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.distributed import sharding
from diffusion.training import checkpoint
from diffusion.training.checkpoint import Checkpoints, Corrupt, Retention
from diffusion.training.resilience import guards
from diffusion.training.state import TrainState
from tests.refusals import refused
from tests.tiers import slow_except

META = {"config": {"seed": 0}, "spec": {"shape": [8]}}


def state(width=4, value=1.0):
    params = {"net": {"w": jnp.full((width,), value)}, "teacher": {"w": jnp.full((2,), 7.0)}}
    ema = {name: {"net": {"w": jnp.full((width,), value + float(name))}} for name in ("0.5", "0.9")}
    moments = optax.adam(1e-3).init(params["net"])
    return TrainState(jnp.int32(3), params, ema, moments, {"losses": jnp.arange(3.0)}, guards.counters())


def abstract(concrete):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), concrete)


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(3, state(), {"examples": 5, "window": {"loss": [2.5, 3]}}, META)
    checkpoints.close()
    return tmp_path


def test_round_trip(saved):
    checkpoints = Checkpoints(str(saved), read_only=True)
    assert checkpoints.latest() == 3
    restored, position = checkpoints.restore(3, abstract(state()))
    assert jax.tree.structure(restored) == jax.tree.structure(state())
    jax.tree.map(np.testing.assert_array_equal, restored, state())
    assert position == {"examples": 5, "window": {"loss": [2.5, 3]}} and checkpoints.meta(3) == META


def test_counters_of_an_older_version(tmp_path):
    """Without a deviation, the running means start again, and the counts of bad steps stay."""
    stored = {"bad": jnp.int32(4), "in_row": jnp.int32(1), "good": jnp.int32(900), "loss": jnp.float32(0.5)}
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(3, dataclasses.replace(state(), guard=stored), {}, META)
    checkpoints.close()
    reader = Checkpoints(str(tmp_path), read_only=True)
    assert reader.check_fits(3, abstract(state())) == {}
    restored, _ = reader.restore(3, abstract(state()))
    assert jax.tree.structure(restored) == jax.tree.structure(state())
    assert jax.device_get(restored.guard) == {"bad": 4, "in_row": 1, "good": 0, "loss": 0, "deviation": 0}


@pytest.mark.parametrize(("ema", "value"), [(None, 1.0), ("0.5", 1.5), ("0.9", 1.9)])
def test_networks_for_sampling(saved, ema, value):
    """The trainable networks are read from the requested average, and the frozen ones are not read."""
    learned = {"net": abstract(state()).params["net"]}
    params = Checkpoints(str(saved), read_only=True).restore_params(3, learned, ema)
    assert params.keys() == {"net"}
    np.testing.assert_allclose(params["net"]["w"], value)


def test_another_shape_is_named(saved):
    checkpoints = Checkpoints(str(saved), read_only=True)
    other = abstract(state())
    other.params["net"]["w"] = other.params["net"]["w"].update(dtype=jnp.bfloat16)
    fewer = abstract(state())
    del fewer.ema["0.9"]
    for tree, words in (
        (abstract(state(width=5)), "ema/0.5/net/w is float32[4] there and float32[5]"),
        (other, "float32[4] there and bfloat16[4]"),
        (fewer, "ema/0.9/net/w is float32[4] there and absent"),
    ):
        with refused("workdir") as caught:
            checkpoints.restore(3, tree)
        assert words in str(caught.value) and not isinstance(caught.value, Corrupt)


def test_no_checkpoint(tmp_path):
    assert Checkpoints(str(tmp_path / "none"), read_only=True).latest() is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "checkpoints").mkdir()
    assert Checkpoints(str(tmp_path), read_only=True).latest() is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


CORRUPTIONS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "flipped": flip,
    "other JSON": lambda path: path.write_text("[]"),
}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A workdir with checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoints = Checkpoints(str(folder))
    for step in (3, 4):
        checkpoints.save(step, state(value=float(step)), {"examples": step}, META)
    checkpoints.close()
    return folder


@pytest.mark.parametrize("how", slow_except(("flipped",), CORRUPTIONS))
def test_corruption_is_detected_or_harmless(two_steps, tmp_path, how, caplog):
    """Corrupts each file of the newest checkpoint in turn: what is read is the newest checkpoint or the one before."""
    caplog.set_level(logging.WARNING, logger="diffusion")
    newest = two_steps / "checkpoints/4"
    names = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(names) > 10
    harmless = []
    for name in names:
        if how == "other JSON" and name.name == "_CHECKPOINT_METADATA":
            continue  # see test_invalid_metadata_of_a_checkpoint
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(two_steps, tmp_path / "run")
        CORRUPTIONS[how](tmp_path / "run/checkpoints/4" / name)
        found = Checkpoints(str(tmp_path / "run"), read_only=True)
        caplog.clear()
        step, read, corrupt = found.newest_valid(lambda step: found.restore(step, abstract(state())))  # noqa: B023
        assert read is not None and read[1] == {"examples": step}, name
        jax.tree.map(np.testing.assert_array_equal, read[0], state(value=float(step)))
        if step == 4:
            harmless.append(name)
        else:
            logged = any("checkpoints/4" in record.getMessage() for record in caplog.records)
            assert corrupt in ([4], []) and logged == bool(corrupt), name
    # Files that Orbax writes for itself may be corrupt without harm; those that hold the arrays may not.
    assert not [name for name in harmless if name.parts[1:2] in (("d",), ("manifest.ocdbt",), ("metadata",))]


def test_invalid_metadata_of_a_checkpoint(saved):
    (saved / "checkpoints/3/_CHECKPOINT_METADATA").write_text("[]")
    with refused("workdir"):
        Checkpoints(str(saved), read_only=True)


def test_a_corrupt_checkpoint_is_quarantined(saved):
    flip(saved / "checkpoints/3/about/metadata")
    checkpoints = Checkpoints(str(saved))
    with refused("workdir") as caught:
        checkpoints.meta(3)
    assert isinstance(caught.value, Corrupt)
    with refused("workdir") as caught:
        checkpoints.newest_valid(checkpoints.meta)
    assert not isinstance(caught.value, Corrupt)
    assert checkpoints.quarantine(3) == str(saved / "quarantine/3") and checkpoints.steps() == []
    assert (saved / "quarantine/3/about/metadata").exists()
    checkpoints.save(3, state(), {"examples": 6}, META)
    checkpoints.wait()
    assert checkpoints.quarantine(3) == str(saved / "quarantine/3_1")
    checkpoints.close()


@pytest.mark.parametrize("call", ["save", "check_for_errors", "wait_until_finished"])
def test_a_failed_save_is_one_line(saved, monkeypatch, call):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(str(saved))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.manager, call, fail)
        with refused("workdir") as caught:
            checkpoints.save(4, state(), {}, META)
            checkpoints.check()
    assert "No space left" in str(caught.value)
    checkpoints.close()
    assert Checkpoints(str(saved), read_only=True).meta(3) == META


def test_a_fault_of_the_code_is_not_reported_as_bad_input(saved, monkeypatch):
    def fail(*args, **kwargs):
        raise TypeError("a fault of the code")

    checkpoints = Checkpoints(str(saved))
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(checkpoints.manager, "save", fail)
        checkpoints.save(4, state(), {}, META)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(checkpoint, "_digests", fail)
        checkpoints.restore(3, abstract(state()))
    checkpoints.close()


def test_other_formats_are_refused(saved, monkeypatch):
    monkeypatch.setattr("diffusion.training.checkpoint.FORMAT", 99)
    with refused("workdir") as caught:
        Checkpoints(str(saved), read_only=True).meta(3)
    assert "99" in str(caught.value) and not isinstance(caught.value, Corrupt)


def expected_digest(x):
    """Returns the stored digest by its definition, with NumPy."""
    size = 1 if x.dtype == bool else min(x.dtype.itemsize, 4)
    words = np.frombuffer(x.tobytes(), f"uint{8 * size}").astype(np.uint64)
    return int(np.sum(words * (2 * np.arange(words.size, dtype=np.uint64) + 1)) % 2**32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "int8"])
def test_a_digest_depends_on_every_bit_and_position(dtype):
    def digest(x):
        digests = [checkpoint._digests({"x": jnp.asarray(x)})["x"], int(checkpoint._digest(jnp.asarray(x)))]
        assert digests[0] == digests[1]  # on the host and on the device
        return digests[0]

    x = np.random.default_rng(0).integers(0, 2, (2, 3, 4)).astype(jnp.dtype(dtype))
    assert digest(x) == digest(x.copy()) == expected_digest(x) != digest(x[:, ::-1].copy())
    assert len({digest(x[a][:, b]) for a in ([0, 1], [1, 0]) for b in ([0, 1, 2], [2, 1, 0])}) == 4
    if dtype != "bool":
        for bit in range(8 * x.dtype.itemsize):
            flipped = x.copy()
            flipped.view(np.uint8)[1, 1, bit // 8] ^= np.uint8(1 << bit % 8)
            assert digest(flipped) != digest(x)


def test_a_digest_is_the_same_on_every_mesh(mesh_of):
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    places = [sharding.by_example(mesh_of(*sizes)) for sizes in ((1, 1, 1), (2, 2, 1), (8, 1, 1))]
    digests = [checkpoint._digests({"x": jax.device_put(x, place)})["x"] for place in places]
    assert digests == [expected_digest(x)] * 3


def test_all_digests_are_read_at_once(monkeypatch):
    reads, read = [], jax.device_get
    monkeypatch.setattr(jax, "device_get", lambda tree: reads.append(tree) or read(tree))
    assert len(checkpoint._digests(state())) > 10 and len(reads) == 1


@pytest.mark.parametrize(("mode", "kept"), [("min", [2, 4, 6]), ("max", [1, 4, 6])])
def test_the_best_and_every_nth_are_kept(tmp_path, mode, kept):
    """A step at which the metric was not measured is never the best."""
    checkpoints = Checkpoints(str(tmp_path), retention=Retention(newest=1, every=4, best="loss", best_mode=mode))
    for step, loss in enumerate((5.0, 1.0, None, 4.0, 2.0, None), 1):
        checkpoints.save(step, state(), {}, META, {"other": 1.0} if loss is None else {"loss": loss})
    checkpoints.wait()
    assert checkpoints.steps() == kept
    checkpoints.close()


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), retention=Retention(2))
    for step in (1, 2, 3):
        checkpoints.save(step, state(value=float(step)), {}, META)
        checkpoints.save(step, state(value=99.0), {}, META)  # the step is saved already
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "3"]
    restored, _ = Checkpoints(str(tmp_path), read_only=True).restore(3, abstract(state()))
    np.testing.assert_allclose(restored.params["net"]["w"], 3)
