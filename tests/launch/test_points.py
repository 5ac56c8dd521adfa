"""The points of a sweep: reading, naming, resolving and validating them."""

import pytest

from configs import mixture
from diffusion.core.types import InputError
from launch import points
from tests.refusals import refused

CONFIG = "configs/moons.py"
GOOD = {"optimizer.learning_rate": 0.001}


def sweep_file(folder, text):
    path = folder / "sweep.py"
    path.write_text(text)
    return str(path)


def test_read_selects_a_function(tmp_path):
    path = sweep_file(tmp_path, "def sweep():\n    yield {'a': 1}\ndef sweep_other():\n    return [{'b': (1, 2)}]\n")
    assert points.read(path) == [{"a": 1}]
    assert points.read(f"{path}:other") == [{"b": (1, 2)}]


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "--sweep"),
        ("def sweep_a(): pass", "--sweep"),
        ("def sweep():\n    return []", "--sweep"),
        ("def sweep():\n    return 1 / 0", "--sweep"),
        ("import nothing_such", "--sweep"),
        ("def sweep():\n    return [3]", "--sweep"),
        ("def sweep():\n    return [{}, {1: 2}]", "--sweep"),
        ("def sweep():\n    return [{'a': object()}]", "--sweep"),
        ("from launch import vary\ndef sweep():\n    return vary.zip([{}], [])", "vary.zip"),
    ],
)
def test_invalid_sweep_files_are_refused(tmp_path, text, field):
    with refused(field):
        points.read(sweep_file(tmp_path, text))


def test_missing_sweep_file_is_refused():
    with refused("--sweep") as caught:
        points.read("x.py")
    assert "configs/sweeps/digits.py" in str(caught.value)


def test_point_is_the_config_with_its_overrides():
    found = points.resolve([{}, GOOD, {"config": "configs/mixture.py", "ema.decays": [0.5, 0.9]}], CONFIG,
                           {"train.steps": 7})  # fmt: skip
    assert [point.config["train"]["steps"] for point in found] == [7, 7, 7]
    assert found[1].config["optimizer"]["learning_rate"] == 0.001 != found[0].config["optimizer"]["learning_rate"]
    assert found[2].config["ema"]["decays"] == (0.5, 0.9)
    assert mixture.get_config().data.to_dict().items() <= found[2].config["data"].items()
    assert found[0].config["data"]["kind"] == "moons"
    assert found[1].flags == (f"--config={CONFIG}", "--config.train.steps=7", "--config.optimizer.learning_rate=0.001")


def test_names_depend_only_on_the_overrides():
    first = points.name_points([GOOD, {"config": CONFIG, "ema.decays": (0.5, 0.9)}, {}])
    assert list(first) == ["learning_rate=0.001-b1c23713", "config=moons,decays=0.5+0.9-c815042a", "point-44136fa3"]
    assert next(iter(points.name_points([{"b": 1, "a": "/x y"}]))).startswith("b=1,a=_x_y-")
    long = list(points.name_points([{"a": "x" * 500}, {"a": "x" * 501}]))
    assert len(set(long)) == 2 and max(map(len, long)) < 80
    assert list(points.name_points([{"name": "mine", **GOOD}])) == ["mine"]


@pytest.mark.parametrize(
    "found",
    [
        [GOOD, {}, dict(GOOD)],  # the same point twice
        [{"name": "x"}, {"name": "x", **GOOD}],
        [{"name": "../x"}],
        [{"optimizer.learning_rat": 1}],
        [{"train.steps": "many"}],
        [{"config": "configs/nothing.py"}],
    ],
)
def test_invalid_points_are_refused(found, tmp_path):
    with refused("--sweep"):
        points.check(points.resolve(found, CONFIG, {}), str(tmp_path), data_here=True)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"network.width": -1}, "network.width"),
        ({"sampler.name": "ddmi"}, "sampler"),
        ({"train.accumulate": 3}, "train.accumulate"),
    ],
)
def test_points_that_training_would_refuse_are_named(overrides, field, tmp_path):
    with refused("--sweep") as caught:
        points.check(points.resolve([GOOD, overrides], CONFIG, {}), str(tmp_path), data_here=True)
    (name,) = points.name_points([overrides])
    assert f"point {name}: " in str(caught.value) and field in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_data_may_be_on_another_machine(tmp_path):
    config = "configs/imagenet256_dit.py:S/2"
    found = points.resolve([{}], config, {})
    with pytest.raises(InputError, match="data"):
        points.check(found, str(tmp_path), data_here=True)
    points.check(found, str(tmp_path), data_here=False)
    with pytest.raises(InputError, match=r"train\.batch_size"):
        points.check(points.resolve([{"train.batch_size": 0}], config, {}), "", data_here=False)
