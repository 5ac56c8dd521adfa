"""Every config documents itself, and its parts fit together."""

import dataclasses
import importlib.util
import inspect
import json
import pathlib
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds

from diffusion.core.build import build, model_spec
from diffusion.core.types import ArraySpec, Spec, class_labels
from diffusion.data.size_conditions import SPECS
from diffusion.objectives.base.teacher import Teacher
from diffusion.pipelines.build_training import training
from diffusion.pipelines.config import check_config, read_config
from diffusion.pipelines.generator import Generator
from diffusion.pipelines.model import build_model
from diffusion.training.state import init_state
from tests.refusals import refused
from tests.tiers import slow_except

ROOT = pathlib.Path(__file__).parents[2]
ARGUMENTS = {
    "cifar10_consistency": ("ict", "cd"),
    "cifar10_edm": ("ddpmpp", "ncsnpp"),
    "cifar10_progressive": ("teacher", "1"),
    "cifar10_reflow": ("distill",),
    "cifar10_scm": ("sct", "scd"),
    "digits_consistency": ("ct", "ict", "ect", "cd", "cd_joint"),
    "digits_reflow": ("reflow", "distill"),
    "digits_scm": ("sct", "scd"),
    "imagenet64_consistency": ("ect",),
    "imagenet64_progressive": ("1",),
    "imagenet64_scm": ("scd",),
    "imagenet256_mean_flow": ("S/2",),
    "imagenet256_dit": ("S/2", "B/2", "L/2", "XL/2", "XL/2,images"),
    "imagenet256_kl": ("f4", "f8", "f16", "f32"),
    "imagenet256_sit": ("S/2", "B/4", "L/8", "XL/2", "L/4,images"),
    "imagenet256_vq": ("f4", "f8", "f16"),
    "mixture": ("ddpm_eps", "ddpm_x0", "ddpm_v", "flow", "vdm"),
    "moons": ("independent", "exact", "sinkhorn"),
    "sd15_finetune": ("eps", "v"),
    "sdxl_finetune": ("eps", "v"),
    "shapes_text": ("latents", "pixels"),
}
# Parameters in millions, as the papers say.
PUBLISHED = {
    ("cifar10_ddpm", ""): "35.7",
    ("cifar10_edm", "ddpmpp"): "55.7",
    ("cifar10_edm", "ncsnpp"): "56.4",
    ("imagenet64_adm", ""): "295.9",
    ("imagenet256_dit", "S/2"): "33",
    ("imagenet256_dit", "B/2"): "130",
    ("imagenet256_dit", "L/2"): "458",
    ("imagenet256_dit", "XL/2"): "675",
    ("imagenet256_sit", "XL/2"): "675",
    ("imagenet256_kl", "f8"): "83.7",
    ("sd15_finetune", "eps"): "859.5",
    ("sdxl_finetune", "eps"): "2567.5",
}
FILES = sorted(path for path in (ROOT / "configs").glob("*.py") if path.stem not in ("__init__", "common"))
CASES = [(path, argument) for path in FILES for argument in ARGUMENTS.get(path.stem, ("",))]


def stem(value):
    return getattr(value, "stem", value)


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Entries of config.json of Stable Diffusion's autoencoder.
SD_VAE = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}


# Those of the text encoders of Stable Diffusion 1.5 and SDXL.
CLIP_L = {
    "architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 768,
    "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "projection_dim": 768,
}  # fmt: skip
CLIP_G = {
    "architectures": ["CLIPTextModelWithProjection"], "model_type": "clip_text_model", "hidden_size": 1280,
    "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32, "projection_dim": 1280,
    "hidden_act": "gelu",
}  # fmt: skip


class Captioned:
    """Stands for pictures with captions, which are not on this machine."""

    def __init__(self, shape, conditions=types.MappingProxyType({})):
        self.spec = Spec(ArraySpec(shape), conditions, captions=True)

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return {"x": np.zeros(self.spec.shape, np.uint8), "cond": {}, "caption": ("grinning face", "red heart")[index]}


def data_of(config, path, doc):
    """Returns the training data and the held-out data; of ImageNet at 256x256 only what they decode to."""
    if config["data"]["name"] == "tfds":
        assert f"experiments.prepare_data --config=configs/{path.name}\n" in doc.replace("    (", "\n")
    sections = config["data"], config["eval"]["data"]
    if path.stem == "emoji_text":
        return [Captioned((64, 64, 3))] * 2
    if path.stem in ("sd15_finetune", "sdxl_finetune"):
        size, conditions = config["data"]["size"], SPECS.get(config["data"]["size_conditions"], {})
        return [Captioned((size, size, 3), conditions)] * 2
    if not path.stem.startswith("imagenet256"):
        with tfds.testing.mock_data(num_examples=2):
            return [build("data", section) for section in sections]
    for section in sections:
        assert section["path"].rpartition("/")[0] in doc
    specs = [Spec(ArraySpec((256, 256, 3)), class_labels(1000 * section["labels"])) for section in sections]
    return [types.SimpleNamespace(spec=spec) for spec in specs]


def write_json(path, content):
    path.parent.mkdir()
    path.write_text(json.dumps(content))


def teacher_of(config, spec):
    """Returns an untrained stand-in for the model that the config names as its teacher."""
    objective = config["objective"]
    if objective.get("teacher") is None:
        return None
    sigma_data = objective.get("sigma_data", 1.0)  # sCM fixes its schedule and parameterization
    theirs = {
        "schedule": objective.get("schedule", {"name": "trig", "sigma_data": sigma_data}),
        "parameterization": objective.get(
            "parameterization", {"name": "edm", "sigma_data": sigma_data, "c_noise": objective.get("c_noise")}
        ),
    }
    network = build(
        "networks", {**config["network"], "scalar_conditions": ()}, shape=spec.shape, num_classes=spec.num_classes
    )
    return Teacher(network, build("objectives", {"name": "denoising", **theirs}), spec, 0.1)


@pytest.mark.parametrize(("path", "argument"), CASES, ids=stem)
def test_is_documented_and_valid(path, argument):
    doc, config = read(path, argument)
    for word in ("Command:", "Hardware:", "Expected:", f"configs/{path.name}"):
        assert word in doc
    check_config(config)


def read(path, argument):
    return module_of(path).__doc__, read_config(f"{path}:{argument}" if argument else str(path))


# Tracing large networks and teachers takes seconds.
TRACED = [
    ("cifar10_ddpm", ""),
    ("digits", ""),
    ("digits_consistency", "ict"),
    ("imagenet256_dit", "S/2"),
    ("moons", "exact"),
]


@pytest.mark.parametrize(
    ("path", "argument"), slow_except(lambda case: (case[0].stem, case[1]) in TRACED, CASES), ids=stem
)
def test_parts_fit(path, argument, tmp_path):
    doc, config = read(path, argument)
    source, held_out = data_of(config, path, doc)
    assert source.spec == held_out.spec
    if config["autoencoder"]:
        assert config["autoencoder"]["path"] in doc
        config["autoencoder"]["path"] = str(tmp_path / "vae")
        write_json(tmp_path / "vae" / "config.json", SD_VAE)
    if config["text_encoder"] and "path" in config["text_encoder"]:
        assert config["text_encoder"]["path"] in doc
        config["text_encoder"]["path"] = str(tmp_path)
        write_json(tmp_path / "text_encoder" / "config.json", CLIP_L)
        write_json(tmp_path / "text_encoder_2" / "config.json", CLIP_G)
    teacher = teacher_of(config, source.spec)
    model = build_model(config, source.spec, teacher, weights=False, source=source)
    network, objective = model.network, model.objective
    keywords = training(config)
    key = jax.random.key(0)
    shapes = jax.eval_shape(network.init, key)
    if (path.stem, argument) in PUBLISHED:
        published = PUBLISHED[path.stem, argument]
        count = sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 1e6
        assert f"{count:.{1 if '.' in published else 0}f}" == published
    # Tracing a large network takes seconds; once is enough.
    network = dataclasses.replace(network, init=lambda key: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes))
    jax.eval_shape(lambda: init_state(objective, network, keywords["optimizer"], keywords["ema"], key))
    if config["objective"]["name"] == "autoencoder":
        return  # it has nothing to sample
    generator = Generator(
        network, objective, model_spec(source.spec, model.autoencoder), keywords["mesh"], sampler=config["sampler"],
        guidance=config["guidance"], text_encoder=model.text_encoder, cond_drop_rate=keywords["options"].cond_drop_rate,
    )  # fmt: skip
    for stated in re.findall(r"([\d,]+)\s+evaluations", doc):
        assert int(stated.replace(",", "")) == generator.solver.evaluations(config["sampler"]["steps"])


@pytest.mark.parametrize(("variant", "scale"), [("ict", 0.02), ("ct", 16.0), ("cd", 16.0), ("ect", 16.0)])
def test_scale_of_the_embedding_of_consistency_models(variant, scale):
    """Improved consistency training lowers it from NCSN++'s 16 (2310.14189, section 3.1)."""
    network = read_config(f"{ROOT}/configs/cifar10_consistency.py:{variant}")["network"]
    assert (network["embedding"], network["embedding_scale"]) == ("fourier", scale)


def test_no_argument_is_forgotten():
    for path in FILES:
        takes = bool(inspect.signature(module_of(path).get_config).parameters)
        assert takes == (path.stem in ARGUMENTS)
    assert PUBLISHED.keys() <= {(path.stem, argument) for path, argument in CASES}


@pytest.mark.parametrize("name", ["cifar10_edm", "imagenet256_dit", "imagenet256_kl", "imagenet256_vq", "mixture"])
def test_an_unknown_argument_lists_the_choices(name):
    get_config = module_of(ROOT / "configs" / f"{name}.py").get_config
    with pytest.raises(LookupError) as caught:
        get_config("M/3")
    choices = str(caught.value).partition("one of: ")[2].split(", ")
    assert set(ARGUMENTS[name]) <= set(choices)
    assert len({get_config(choice).to_json() for choice in choices}) == len(choices)


def test_unsupported_sampling_is_refused_when_it_is_built(digits, tiny_unet, ddpm, mesh_of):
    sampler = {"name": "ancestral", "variance": "learned", "steps": 2}
    with refused("sampler.variance"):
        Generator(
            tiny_unet, ddpm, digits.spec, mesh_of(1, 1, 1), sampler=sampler, guidance={"name": "cfg"},
            cond_drop_rate=0.1,
        )  # fmt: skip
