"""The configs that names and shapes of tensors tell are those of published models."""

import gzip
import json

import numpy as np
import pytest

from diffusion.core import model_folder, original_configs
from diffusion.core.original_layout import to_original
from tests.published import published

# For each published model, its family and the names of its parts among the published shapes.
MODELS = {
    "runwayml/stable-diffusion-v1-5": ("sd1", {"unet": "sd15_unet", "vae": "sd15_vae", "text_encoder": "clipL"}),
    "stabilityai/stable-diffusion-2-1": ("sd2", {"unet": "sd21_unet", "vae": "sd21_vae", "text_encoder": "clipH"}),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "sdxl",
        {"unet": "sdxl_unet", "vae": "sdxl_vae", "text_encoder": "clipL", "text_encoder_2": "clipG"},
    ),
}
# What shapes do not tell: the size of images, and what has no effect on the function of these models.
OTHERS = {"sample_size", "force_upcast", "torch_dtype", "transformers_version", "bos_token_id", "pad_token_id",
          "attention_dropout", "dropout", "initializer_factor", "initializer_range"}  # fmt: skip


def tensors_of(name):
    """Returns tensors of the published shapes, which take no memory."""
    with gzip.open(published("names_and_shapes.json.gz")) as file:
        shapes = json.load(file)[name]
    found = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    if name.startswith("clip"):
        return {key if key.startswith("text_") else f"text_model.{key}": tensor for key, tensor in found.items()}
    return found


@pytest.mark.parametrize("folder", MODELS)
def test_the_configs_of_published_models(folder):
    kind, parts = MODELS[folder]
    configs = {}
    for part, name in parts.items():
        tensors = tensors_of(name)
        if part == "unet":
            configs[part] = original_configs.unet_config(to_original("unet", tensors))
        elif part == "vae":
            configs[part] = original_configs.vae_config(to_original("vae", tensors), kind)
        else:
            configs[part] = original_configs.text_config("clip" if name == "clipL" else "open_clip", tensors, kind)
        expected = model_folder.read_json(str(published(folder, part)), "config.json")
        different = {key for key in configs[part].keys() & expected.keys()
                     if (configs[part][key] or expected[key]) and configs[part][key] != expected[key]}  # fmt: skip
        # 2.1 has a projection_dim for a projection that its class lacks.
        assert different - OTHERS == ({"projection_dim"} if name == "clipH" else set()), part
    assert original_configs.kind_of(configs["unet"], kind == "sd2") == kind
    assert original_configs.kind_of(configs["unet"], None) == kind
    index = original_configs.pipeline_config(kind, configs)
    assert index["_class_name"] == model_folder.read_json(str(published(folder)), "model_index.json")["_class_name"]
    scheduler = model_folder.read_json(str(published(folder, "scheduler")), "scheduler_config.json")
    found = original_configs.scheduler_config(kind, configs["unet"], scheduler.get("prediction_type", "epsilon"), False)
    assert {key: scheduler[key] for key in found.keys() & scheduler.keys()} == {
        key: found[key] for key in found.keys() & scheduler.keys()
    }


def test_the_last_layer_in_files_of_stable_diffusion_2_is_left_out():
    tensors = tensors_of("clipH")
    last = "text_model.encoder.layers.22."
    tensors |= {key.replace(last, last.replace("22", "23")): each for key, each in tensors.items() if last in key}
    assert original_configs.text_config("open_clip", tensors, "sd2")["num_hidden_layers"] == 23
    assert original_configs.text_config("clip", tensors, "sd1")["num_hidden_layers"] == 24


@pytest.mark.parametrize(
    ("channels", "condition", "name"),
    [
        (9, None, "StableDiffusionInpaintPipeline"),
        (8, None, "StableDiffusionInstructPix2PixPipeline"),
        (4, 256, "LatentConsistencyModelPipeline"),
    ],
)
def test_the_classes_of_other_pipelines(channels, condition, name):
    unet = {"in_channels": channels, "out_channels": 4, "addition_embed_type": None, "time_cond_proj_dim": condition}
    assert original_configs.pipeline_config("sd1", {"unet": unet})["_class_name"] == name
    scheduler = original_configs.scheduler_config("sd1", unet, "epsilon", False)["_class_name"]
    assert scheduler == ("LCMScheduler" if condition else "PNDMScheduler")
