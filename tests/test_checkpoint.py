import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.checkpoint import Checkpoints
from diffusion.training.state import TrainState
from diffusion.types import InputError

META = {"config": {"seed": 0}, "spec": {"shape": [8]}}


def state(width=4, value=1.0):
    params = {"net": {"w": jnp.full((width,), value)}, "teacher": {"w": jnp.full((2,), 7.0)}}
    ema = {name: {"net": {"w": jnp.full((width,), value + float(name))}} for name in ("0.5", "0.9")}
    return TrainState(jnp.int32(3), params, ema, optax.adam(1e-3).init(params["net"]), {"losses": jnp.arange(3.0)})


def abstract(concrete):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), concrete)


@pytest.fixture
def saved(tmp_path):
    checkpoints = Checkpoints(str(tmp_path))
    checkpoints.save(3, state(), {"next_index": 5}, META)
    checkpoints.close()
    return tmp_path


def test_round_trip(saved):
    checkpoints = Checkpoints(str(saved), read_only=True)
    assert checkpoints.latest() == 3
    restored, data = checkpoints.restore(3, abstract(state()))
    assert jax.tree.structure(restored) == jax.tree.structure(state())
    jax.tree.map(np.testing.assert_array_equal, restored, state())
    assert data == {"next_index": 5} and checkpoints.meta(3) == {"format": 1, **META}


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
        InputError, match=r"workdir: .*params/net/w is float32\[4\] there and float32\[5\] in the config"
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


def damage_meta(folder):
    (folder / "meta/metadata").write_text("{")


def damage_arrays(folder):
    for path in (folder / "params").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def drop_item(folder):
    shutil.rmtree(folder / "optimizer")


@pytest.mark.parametrize("damage", [damage_meta, damage_arrays, drop_item])
def test_damage_is_one_line(saved, damage):
    damage(saved / "checkpoints/3")
    checkpoints = Checkpoints(str(saved), read_only=True)
    with pytest.raises(InputError, match=r"workdir: .*checkpoints/3 cannot be read; move it away") as error:
        checkpoints.meta(3)
        checkpoints.restore(3, abstract(state()))
    assert "\n" not in str(error.value)


def test_other_formats_are_refused(saved):
    path = saved / "checkpoints/3/meta/metadata"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(InputError, match="has format 99; this code reads 1"):
        Checkpoints(str(saved), read_only=True).meta(3)


def test_keeps_the_newest(tmp_path):
    checkpoints = Checkpoints(str(tmp_path), keep=2)
    for step in (1, 2, 3):
        checkpoints.save(step, state(value=float(step)), {}, META)
        checkpoints.save(step, state(value=99.0), {}, META)  # saved already
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()) == ["2", "3"]
    restored, _ = Checkpoints(str(tmp_path), read_only=True).restore(3, abstract(state()))
    np.testing.assert_allclose(restored.params["net"]["w"], 3)
