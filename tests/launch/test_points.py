import pytest

from configs import mixture
from diffusion.core.types import InputError
from launch import points

CONFIG = "configs/moons.py"
GOOD = {"optimizer.learning_rate": 0.001}


def sweep_file(folder, text):
    path = folder / "sweep.py"
    path.write_text(text)
    return str(path)


def test_a_sweep_and_others_beside_it(tmp_path):
    path = sweep_file(tmp_path, "def sweep():\n    yield {'a': 1}\ndef sweep_other():\n    return [{'b': (1, 2)}]\n")
    assert points.read(path) == [{"a": 1}]
    assert points.read(f"{path}:other") == [{"b": (1, 2)}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"has no sweep\(\); there are: none"),
        ("def sweep_a(): pass", r"has no sweep\(\); there are: sweep_a"),
        ("def sweep():\n    return []", "yields nothing"),
        ("def sweep():\n    return 1 / 0", "raised ZeroDivisionError: division by zero"),
        ("import nothing_such", "raised ModuleNotFoundError"),
        ("def sweep():\n    return [3]", "point 0 must be a dict of dotted fields, got 3"),
        ("def sweep():\n    return [{}, {1: 2}]", "point 1 must be a dict of dotted fields"),
        ("def sweep():\n    return [{'a': object()}]", "point 0 holds what no config does"),
        ("from launch import vary\ndef sweep():\n    return vary.zip([{}], [])", "vary.zip: the parts must be of one"),
    ],
)
def test_bad_sweeps(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        points.read(sweep_file(tmp_path, text))


def test_no_such_sweep():
    with pytest.raises(InputError, match=r"--sweep: no file 'x.py'; there are: .*configs/sweeps/digits.py"):
        points.read("x.py")


def test_a_point_is_the_config_with_its_overrides():
    found = points.resolved([{}, GOOD, {"config": "configs/mixture.py", "ema.decays": [0.5, 0.9]}], CONFIG,
                            {"train.steps": 7})  # fmt: skip
    assert [point.config["train"]["steps"] for point in found] == [7, 7, 7]
    assert found[1].config["optimizer"]["learning_rate"] == 0.001 != found[0].config["optimizer"]["learning_rate"]
    assert found[2].config["ema"]["decays"] == (0.5, 0.9)
    assert found[2].config["data"] == mixture.get_config().data.to_dict() != found[0].config["data"]
    assert found[1].flags == (f"--config={CONFIG}", "--config.train.steps=7", "--config.optimizer.learning_rate=0.001")


def test_names_follow_from_the_overrides_alone():
    first = points.named([GOOD, {"config": CONFIG, "ema.decays": (0.5, 0.9)}, {}])
    assert list(first) == ["learning_rate=0.001-b1c23713", "config=moons,decays=0.5+0.9-c815042a", "point-44136fa3"]
    assert next(iter(points.named([{"b": 1, "a": "/x y"}]))).startswith("b=1,a=_x_y-")
    long = list(points.named([{"a": "x" * 500}, {"a": "x" * 501}]))
    assert len(set(long)) == 2 and max(map(len, long)) < 80
    assert list(points.named([{"name": "mine", **GOOD}])) == ["mine"]


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "..", ".", "-x", "", " ", "a\0", "x" * 200])
def test_names_that_lead_elsewhere(name):
    with pytest.raises(InputError, match=r"^--sweep: .*wants letters, digits"):
        points.named([{"name": name}])


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([GOOD, {}, dict(GOOD)], "points 0 and 2 are the same: learning_rate=0.001"),
        ([{"name": "x"}, {"name": "x", **GOOD}], "points 0 and 1 are the same: x"),
        (
            [{"optimizer.learning_rat": 1}],
            r"point .*: --config.optimizer.learning_rat: the config has no .* did you mean",
        ),
        ([{"train.steps": "many"}], "point .*steps=many.*: .*invalid literal"),
        ([{"config": "configs/nothing.py"}], "point .*: --config: no file 'configs/nothing.py'"),
    ],
)
def test_bad_points(found, message):
    with pytest.raises(InputError, match=f"^--sweep: {message}"):
        points.resolved(found, CONFIG, {})


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"network.width": -1}, "network.width: must be"),
        ({"sampler.name": "ddmi"}, "sampler.name: no 'ddmi' in samplers; did you mean 'ddim'"),
        ({"optimizer.warmup": 10**6}, "optimizer.warmup: must be"),
    ],
)
def test_what_training_would_refuse(overrides, message, tmp_path):
    found = points.resolved([GOOD, overrides], CONFIG, {})
    with pytest.raises(InputError, match=f"^--sweep: point {found[1].name.partition(',')[0][:8]}.*: {message}"):
        points.check(found, str(tmp_path), data_here=True)
    assert not list(tmp_path.iterdir())


def test_the_data_may_be_elsewhere(tmp_path):
    found = points.resolved([{}], "configs/imagenet256_dit.py:S/2", {})
    with pytest.raises(InputError, match="data"):
        points.check(found, str(tmp_path), data_here=True)
    points.check(found, str(tmp_path), data_here=False)
    with pytest.raises(InputError, match=r"train.batch_size: must be at least 1"):
        points.check(
            points.resolved([{"train.batch_size": 0}], "configs/imagenet256_dit.py:S/2", {}), "", data_here=False
        )
