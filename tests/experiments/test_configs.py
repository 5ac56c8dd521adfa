"""Every config says what it is and how to run it, and its parts fit together."""

import importlib.util
import inspect
import pathlib

import jax
import pytest

from diffusion.build import build
from diffusion.training.state import init_state
from diffusion.types import InputError
from experiments import parts
from experiments.drawing import Drawer

ROOT = pathlib.Path(__file__).parent.parent.parent
ARGUMENTS = {"mixture": ("ddpm_eps", "ddpm_x0", "ddpm_v", "flow", "vdm"), "moons": ("independent", "exact", "sinkhorn")}
CASES = [
    (path, argument) for path in sorted((ROOT / "configs").glob("*.py")) for argument in ARGUMENTS.get(path.stem, ("",))
]


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("path", "argument"), CASES, ids=lambda value: getattr(value, "stem", value))
def test_parts_fit(path, argument):
    module = module_of(path)
    for word in ("Command:", "Hardware:", "Expected:", f"configs/{path.name}"):
        assert word in module.__doc__
    config = (module.get_config(argument) if argument else module.get_config()).to_dict()
    parts.check_sections(config)
    source, held_out = build("data", config["data"]), build("data", config["eval"]["data"])
    network, objective = parts.network_and_objective(config, source.spec)
    keywords = parts.training(config)
    key = jax.random.key(0)
    jax.eval_shape(lambda: init_state(objective, network, keywords["optimizer"].transform, keywords["ema"], key))
    Drawer(
        network, objective, source.spec, keywords["mesh"], sampler=config["sampler"], guidance=config["guidance"],
        cond_drop_rate=keywords["options"].cond_drop_rate,
    )  # fmt: skip
    for name, options in config["eval"]["metrics"].items():
        make = importlib.import_module(f"diffusion.evaluation.{name}").make
        assert options.keys() <= inspect.signature(make).parameters.keys()
    assert source.spec == held_out.spec


def test_no_argument_is_forgotten():
    for path in (ROOT / "configs").glob("*.py"):
        takes = bool(inspect.signature(module_of(path).get_config).parameters)
        assert takes == (path.stem in ARGUMENTS)


def test_what_a_model_cannot_sample_is_refused_before_it_is_asked(digits, tiny_unet, ddpm, mesh_of):
    sampler = {"name": "ancestral", "variance": "learned", "steps": 2}
    with pytest.raises(InputError, match=r"sampler.variance: the model has learned no variance"):
        Drawer(
            tiny_unet,
            ddpm,
            digits.spec,
            mesh_of(1, 1, 1),
            sampler=sampler,
            guidance={"name": "cfg"},
            cond_drop_rate=0.1,
        )
