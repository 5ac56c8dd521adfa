import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.core.types import InputError
from diffusion.distributed import sharding
from diffusion.training import checkpoint
from diffusion.training.checkpoint import Checkpoints, Damaged, Retention
from diffusion.training.resilience import guards
from diffusion.training.state import TrainState

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
    checkpoints.save(3, state(), {"examples": 5}, META)
    checkpoints.close()
    return tmp_path


def test_round_trip(saved):
    checkpoints = Checkpoints(str(saved), read_only=True)
    assert checkpoints.latest() == 3
    restored, data = checkpoints.restore(3, abstract(state()))
    assert jax.tree.structure(restored) == jax.tree.structure(state())
    jax.tree.map(np.testing.assert_array_equal, restored, state())
    assert data == {"examples": 5} and checkpoints.meta(3) == META


@pytest.mark.parametrize(("ema", "value"), [(None, 1.0), ("0.5", 1.5), ("0.9", 1.9)])
def test_networks_for_sampling(saved, ema, value):
    """The trainable ones from the average asked for, and the frozen ones not at all."""
    learned = {"net": abstract(state()).params["net"]}
    params = Checkpoints(str(saved), read_only=True).restore_params(3, learned, ema)
    assert params.keys() == {"net"}
    np.testing.assert_allclose(params["net"]["w"], value)


def test_other_shapes_are_named(saved):
    checkpoints = Checkpoints(str(saved), read_only=True)
    with pytest.raises(
        InputError, match=r"workdir: .*ema/0.5/net/w is float32\[4\] there and float32\[5\] in the config"
    ):
        checkpoints.restore(3, abstract(state(width=5)))
    other = abstract(state())
    other.params["net"]["w"] = other.params["net"]["w"].update(dtype=jnp.bfloat16)
    with pytest.raises(InputError, match=r"float32\[4\] there and bfloat16\[4\]"):
        checkpoints.restore(3, other)
    other = abstract(state())
    del other.ema["0.9"]
    with pytest.raises(InputError, match=r"ema/0.9/net/w is float32\[4\] there and absent in the config"):
        checkpoints.restore(3, other)


def test_no_checkpoint(tmp_path):
    assert Checkpoints(str(tmp_path / "none"), read_only=True).latest() is None
    assert not (tmp_path / "none").exists()
    (tmp_path / "checkpoints").mkdir()
    assert Checkpoints(str(tmp_path), read_only=True).latest() is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "emptied": lambda path: path.write_bytes(b""),
    "removed": lambda path: path.unlink(),
    "flipped": flip,
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_is_detected_or_harmless(tmp_path, how, capsys):
    """Of every file of the newest checkpoint in turn: what is read is the newest, or the one before."""
    checkpoints = Checkpoints(str(tmp_path / "whole"))
    for step in (3, 4):
        checkpoints.save(step, state(value=float(step)), {"examples": step}, META)
    checkpoints.close()
    newest = tmp_path / "whole/checkpoints/4"
    names = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    assert len(names) > 10
    harmless = []
    for name in names:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        DAMAGES[how](tmp_path / "run/checkpoints/4" / name)
        found = Checkpoints(str(tmp_path / "run"), read_only=True)
        step, read, damaged = found.newest_valid(lambda step: found.restore(step, abstract(state())))  # noqa: B023
        assert read is not None and read[1] == {"examples": step}, name
        jax.tree.map(np.testing.assert_array_equal, read[0], state(value=float(step)))
        if step == 4:
            harmless.append(name)
        else:
            assert damaged in ([4], []) and ("checkpoints/4 is damaged" in capsys.readouterr().err) == bool(damaged), (
                name
            )
    # What Orbax writes for itself alone may be damaged without harm; what holds the arrays may not.
    assert not [name for name in harmless if name.parts[1:2] in (("d",), ("manifest.ocdbt",), ("metadata",))]


def test_a_damaged_checkpoint_is_set_aside(saved):
    flip(saved / "checkpoints/3/about/metadata")
    checkpoints = Checkpoints(str(saved))
    with pytest.raises(Damaged, match=r"^workdir: .*checkpoints/3 is damaged \(its description is not the one"):
        checkpoints.meta(3)
    with pytest.raises(
        InputError, match=r"checkpoints/3 is damaged \(.*\), and no other is sound; move .*checkpoints away"
    ):
        checkpoints.newest_valid(checkpoints.meta)
    assert checkpoints.quarantine(3) == str(saved / "damaged/3") and checkpoints.steps() == []
    assert (saved / "damaged/3/about/metadata").exists()
    checkpoints.save(3, state(), {"examples": 6}, META)
    checkpoints.wait()
    assert checkpoints.quarantine(3) == str(saved / "damaged/3_1")
    checkpoints.close()


@pytest.mark.parametrize("call", ["save", "check_for_errors", "wait_until_finished"])
def test_a_save_that_fails_is_one_line(saved, monkeypatch, call):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    checkpoints = Checkpoints(str(saved))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.manager, call, fail)
        with pytest.raises(
            InputError, match=r"^workdir: .* cannot be saved \(.*No space left.*\); those before it are"
        ):
            checkpoints.save(4, state(), {}, META)
            checkpoints.check()
    checkpoints.close()
    assert Checkpoints(str(saved), read_only=True).meta(3) == META


def test_other_formats_are_refused(saved, monkeypatch):
    monkeypatch.setattr("diffusion.training.checkpoint.FORMAT", 99)
    with pytest.raises(InputError, match="has format 2; this code reads 99"):
        Checkpoints(str(saved), read_only=True).meta(3)
    (saved / "checkpoints/3/about").rename(saved / "checkpoints/3/meta")
    with pytest.raises(InputError, match="has format 1; this code reads 99"):
        Checkpoints(str(saved), read_only=True).meta(3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "int8"])
def test_a_digest_sees_every_bit_and_place(dtype):
    def digest(x):
        return int(checkpoint._digest(jnp.asarray(x)))

    x = np.random.default_rng(0).integers(0, 2, (2, 3, 4)).astype(jnp.dtype(dtype))
    assert digest(x) == digest(x.copy()) != digest(x[:, ::-1].copy())
    assert len({digest(x[a][:, b]) for a in ([0, 1], [1, 0]) for b in ([0, 1, 2], [2, 1, 0])}) == 4
    if dtype != "bool":
        for bit in range(8 * x.dtype.itemsize):
            flipped = x.copy()
            flipped.view(np.uint8)[1, 1, bit // 8] ^= np.uint8(1 << bit % 8)
            assert digest(flipped) != digest(x)


def test_a_digest_is_the_same_on_every_mesh(mesh_of):
    x = np.random.default_rng(0).normal(size=(8, 6)).astype(np.float32)
    places = [sharding.by_example(mesh_of(*sizes)) for sizes in ((1, 1, 1), (2, 2, 1), (8, 1, 1))]
    assert len({int(checkpoint._digest(jax.device_put(x, place))) for place in places}) == 1


def test_the_best_and_every_so_many_are_kept(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), retention=Retention(newest=1, every=4, best="loss"))
    for step, loss in enumerate((5.0, 1.0, 3.0, 4.0, 2.0, 6.0), 1):
        checkpoints.save(step, state(), {}, META, {"loss": loss})
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4, 6]
    with pytest.raises(InputError, match=r"checkpoint.best: the run has no metric 'loss'; one of: other"):
        checkpoints.save(7, state(), {}, META, {"other": 1.0})
    checkpoints.close()


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), retention=Retention(2))
    for step in (1, 2, 3):
        checkpoints.save(step, state(value=float(step)), {}, META)
        checkpoints.save(step, state(value=99.0), {}, META)  # saved already
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "3"]
    restored, _ = Checkpoints(str(tmp_path), read_only=True).restore(3, abstract(state()))
    np.testing.assert_allclose(restored.params["net"]["w"], 3)
