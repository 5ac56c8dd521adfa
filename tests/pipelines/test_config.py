"""Configs: defaults, overrides and the options that flags can set."""

import functools
import glob
import inspect
import json
import pathlib
import runpy
import sys

import ml_collections
import pytest

from diffusion.core import files
from diffusion.core.build import find, names
from diffusion.pipelines import config as configs
from diffusion.pipelines.build_training import build_training
from diffusion.pipelines.config import override, read_config, resolve
from diffusion.pipelines.generator import PERTURBED, SUPPLIED
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted(
    path for path in glob.glob(str(ROOT / "configs" / "*.py")) if "get_config" in pathlib.Path(path).read_text()
)
DIGITS = str(ROOT / "configs" / "digits.py")
SPARSE = {
    "data": "digits",
    "objective": {"name": "flow_matching"},
    "network": "mlp",
    "train": {"steps": 10, "batch_size": 16},
}


@functools.cache
def variants(path: str) -> tuple[str, ...]:
    """Returns a config file with each of its variants."""
    found = runpy.run_path(path)
    keys = next((found[name] for name in ("VARIANTS", "METHODS", "NETWORKS") if name in found), ())
    return tuple(f"{path}:{key}" for key in keys) or (path,)


@pytest.mark.parametrize(
    "spec",
    [
        {"name": "consistency"},
        {"name": "continuous_consistency", "distill": False},
        {"name": "gan"},
    ],
    ids=lambda spec: spec["name"],
)
def test_an_objective_has_a_default_sampler(spec):
    """A config without a sampler can be trained, which checks that the sampler suits the model."""
    config = resolve({**SPARSE, "objective": spec})
    assert config["sampler"]["name"] == "consistency" and config["sampler"]["steps"] <= 2
    assert resolve({**SPARSE, "objective": spec, "sampler": {"steps": 3}})["sampler"]["steps"] == 3
    assert resolve({**SPARSE, "objective": spec, "sampler": "ddim"})["sampler"]["steps"] == 50
    build_training(config, "none")


def options(section, prefix=()):
    """Yields the path and value of every option of a resolved config."""
    for key, value in section.items():
        yield ".".join((*prefix, key)), value
        if isinstance(value, dict):
            yield from options(value, (*prefix, key))


def text(value) -> str:
    return value if isinstance(value, str) else repr(value)


@pytest.mark.parametrize(
    "path",
    [path if path == DIGITS else pytest.param(path, marks=pytest.mark.slow) for path in FILES],
    ids=lambda path: pathlib.Path(path).stem,
)
def test_every_option_can_be_set_by_a_flag(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    for variant in variants(path):
        sparse = configs.from_config_dict(read_sparse(variant))
        full = resolve(sparse)
        assert resolve(full) == full and json.loads(json.dumps(full)) is not None
        for option, value in options(full):
            if option != "version":
                assert resolve(override(sparse, [(option, text(value))])) == full, (variant, option)


def read_sparse(variant: str) -> ml_collections.ConfigDict:
    path, _, argument = variant.partition(":")
    return runpy.run_path(path)["get_config"](*filter(None, [argument]))


@pytest.mark.parametrize(
    ("section", "family"),
    [("network", "networks"), ("objective", "objectives"), ("sampler", "samplers"), ("sampler.grid", "grids"),
     ("guidance", "guidance"), ("objective.schedule", "schedules"), ("objective.weighting", "weighting"),
     ("objective.time_sampler", "time_sampling"), ("objective.parameterization", "parameterization")],
)  # fmt: skip
def test_every_option_of_another_part_can_be_set(section, family):
    supplied = {"shape", "num_classes", "schedule", "steps", *SUPPLIED}
    for name in names(family):
        if section == "guidance" and name in configs.WRAPPERS and name not in PERTURBED:
            continue
        later = supplied if family in ("networks", "grids", "guidance") else set()
        for option in inspect.signature(find(family, name, field="")).parameters.keys() - later:
            changed = override(SPARSE, [(f"{section}.{option}", "1"), (f"{section}.name", name)])
            node = functools.reduce(dict.__getitem__, section.split("."), changed)
            assert node["name"] == name and option in node


def test_defaults_are_those_of_the_signatures():
    full = resolve(SPARSE)
    assert full["network"]["width"] == inspect.signature(find("networks", "mlp", field="")).parameters["width"].default
    assert full["objective"]["schedule"]["name"] == "flow" and full["train"]["log_every"] == 50
    assert full["optimizer"]["name"] == "adamw" and full["optimizer"]["b1"] == 0.9
    assert full["eval"]["data"] == full["data"] and full["sampler"]["grid"]["name"] == "trailing"


def test_a_new_name_keeps_the_options_that_both_parts_have():
    changed = override(SPARSE, [("network.width", "24"), ("network.name", "dit"), ("network.num_heads", "3")])
    assert changed["network"] == {"name": "dit", "width": 24, "num_heads": 3}
    changed = override({**SPARSE, "network": {"name": "mlp", "width": 24, "depth": 2}}, [("network", "unet")])
    assert changed["network"] == {"name": "unet", "width": 24}


def test_values_are_read_as_python_or_text():
    changed = override(SPARSE, [
        ("train.spike", "5"), ("ema.decays", "(0.9,)"), ("ema.warmup", "false"), ("data.split", "test"),
        ("objective.weighting", "{'name': 'min_snr', 'gamma': 3}"), ("checkpoint.minutes", "None"),
    ])  # fmt: skip
    assert changed["train"]["spike"] == 5 and changed["ema"] == {"decays": (0.9,), "warmup": False}
    assert changed["data"] == {"name": "digits", "split": "test"} and changed["checkpoint"]["minutes"] is None
    assert changed["objective"]["weighting"] == {"name": "min_snr", "gamma": 3}


@pytest.mark.parametrize(
    ("option", "field"),
    [
        ("netwrk.width=3", "config.netwrk.width"),
        ("network.widht=3", "config.network.widht"),
        ("train.steps.more=3", "config.train.steps.more"),
        ("objective.name=dpm", "config.objective.name"),
        ("objective.weighting.gama=3", "config.objective.weighting.gama"),
        ("eval.metrics.fud.num=3", "eval.metrics"),
        ("seed=-1", "config.seed"),
        ("train=3", "config.train"),
    ],
)
def test_unknown_options_are_refused(option, field):
    with refused(field):
        read_config(DIGITS, [tuple(option.split("="))])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"netwrk": {}}, "config.netwrk"),
        ({"network": {}}, "network.name"),
        ({"train": 3}, "config.train"),
        ({"seed": 1.5}, "config.seed"),
        ({"version": 1}, "config.version"),
        ({"eval": {"metrics": {"svc_accuracy": 3}}}, "eval.metrics.svc_accuracy"),
        ({"guidance": {"rescale": 0.7}}, "guidance.rescale"),
    ],
)
def test_invalid_sections_are_refused(change, field):
    with refused(field):
        resolve({**SPARSE, **change})


def test_every_wrapper_of_guidance_can_be_a_section():
    for wrapper in set(configs.WRAPPERS) - {"pag", "seg", "slg"}:  # those need a network with attention
        config = resolve({**SPARSE, "guidance": {"scale": 2.0, wrapper: {}}})
        assert not set(config["guidance"][wrapper]) & set(SUPPLIED)
        build_training(config, "none")


def test_a_section_may_be_left_out_but_not_the_model():
    with refused("config.network"):
        resolve({key: value for key, value in SPARSE.items() if key != "network"})


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("optimizer.clip=None", None),
        ("train.steps=1e3", 1000),
        ("eval.metrics.svc_accuracy.num=2e2", 200),
        ("eval.every=2.0", 2),
        ("network.dropout=0", 0),
        ("ema.decays=0.9,0.99", (0.9, 0.99)),
        ("ema.decays=0.9", (0.9,)),
        ("train.trainable=net/a", ("net/a",)),
        ("train.trainable=('net/a', 'net/b')", ("net/a", "net/b")),
        ("train.cond_drop_rate={'label': 0.2}", {"label": 0.2}),
        ("data.split=123", "123"),
        ("checkpoint.keep_best=1.5", "1.5"),
        ("ema.warmup=True", True),
        ("guidance.name=apg", "apg"),
    ],
)
def test_a_flag_has_the_type_of_its_option(option, value):
    path, _, text = option.partition("=")
    node = functools.reduce(dict.__getitem__, path.split("."), read_config(DIGITS, [(path, text)]))
    assert node == value and type(node) is type(value)


def test_a_text_option_can_be_set_back_to_none():
    config = {**SPARSE, "checkpoint": {"keep_best": "loss"}, "train": {**SPARSE["train"], "trainable": ("net",)}}
    changed = resolve(override(config, [("checkpoint.keep_best", "None"), ("train.trainable", "None")]))
    assert changed["checkpoint"]["keep_best"] is None and changed["train"]["trainable"] is None


TINY_CONFIG = "dict(data='digits', objective='flow_matching', network='mlp', train=dict(steps={}))"


@pytest.mark.parametrize(
    "content",
    [
        f"def get_config():\n    return {TINY_CONFIG.format(7)}",
        f"import ml_collections as c\nget_config = lambda: c.ConfigDict({TINY_CONFIG.format(7)})",
        f"import ml_collections as c\nget_config = lambda: c.FrozenConfigDict({TINY_CONFIG.format(7)})",
        "import ml_collections as c\nget_config = lambda: "
        f"{{**{TINY_CONFIG.format(1)}, 'train': c.ConfigDict({{'steps': 7}})}}",
        f"import numpy as np\nget_config = lambda: {TINY_CONFIG.format('np.int64(7)')}",
        f"def get_config(steps=7):\n    return {TINY_CONFIG.format('steps')}",
        "from neighbor import get_config",
    ],
)  # fmt: skip
def test_forms_of_a_config(content, tmp_path):
    (tmp_path / "neighbor.py").write_text(f"def get_config():\n    return {TINY_CONFIG.format(7)}")
    path, before = tmp_path / "config.py", list(sys.path)
    path.write_text(content)
    assert read_config(str(path))["train"]["steps"] == 7 and sys.path == before


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ("", "--config"),
        ("get_config = 3", "--config"),
        ("def get_config(): pass", "--config"),
        ("def get_config(): return [1]", "--config"),
        ("def get_config(name): return {}", "--config"),
        ("def get_config(*, name): return {}", "--config"),
        ("def get_config(): return {'train': {'steps': len}}", "config.train.steps"),
        ("def get_config(): return {'train': {3: 4}}", "config.train"),
        ("raise ValueError('x')", "--config={path}"),
        ("def get_config(): return 1 / 0", "--config={path}"),
        ("import sys\ndef get_config(): sys.exit(0)", "--config={path}"),
        ("from ml_collections import config_dict as c\n"
         "get_config = lambda: c.ConfigDict({'seed': c.required_placeholder(int)})", "--config={path}"),
        ("x = (", "--config={path}"),
    ],
)  # fmt: skip
def test_files_that_define_no_config(content, field, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(content)
    with refused(field.format(path=path)):
        read_config(str(path))


def test_a_missing_file_names_its_nearest_neighbor_alone():
    with refused("--config") as caught:
        read_config(DIGITS.replace("digits", "digit"))
    assert caught.value.problem.endswith("digits.py'?") and caught.value.problem.count(".py") == 2
    with refused("--config"):
        read_config(f"{DIGITS}:argument")


def test_infinity_is_stored_as_json():
    config = resolve({**SPARSE, "guidance": {"name": "apg"}})
    assert config["guidance"]["norm"] == float("inf")
    stored = json.loads(files.json_text(config), parse_constant=pytest.fail)
    assert stored["guidance"]["norm"] == "Infinity" and resolve(configs.from_json(stored)) == config
