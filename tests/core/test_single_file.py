"""Single files in the original layout are read like the folders of pipelines, and say what they cannot be read for."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
import safetensors.numpy

from diffusion.core import single_file, tensor_file
from diffusion.core.build import build
from diffusion.encoders import autoencoder_folder, text_folder
from diffusion.interop import diffusers_models
from tests.refusals import refused
from tests.single_files import FAMILIES, write_pipeline, write_single_file
from tests.tiers import slow_except


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Returns a function to the folder and the file of a family."""

    @functools.cache
    def write(family):
        folder = write_pipeline(tmp_path_factory.mktemp(family) / "folder", family)
        return folder, write_single_file(tmp_path_factory.mktemp(family) / "file.safetensors", folder)

    return write


@pytest.mark.parametrize("family", slow_except(("sdxl",), FAMILIES))
def test_a_file_is_read_like_a_folder(family, pipeline):
    folder, file = pipeline(family)
    opened = single_file.read(file)
    assert opened.kind == {"inpainting": "sd1"}.get(family, family)
    assert opened.config("scheduler") == FAMILIES[family][3] | opened.config("scheduler")
    first, second = (diffusers_models.read(f"{path}/unet") for path in (folder, file))
    assert (first.network, first.spec) == (second.network, second.spec)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    (first, _), (second, _) = (autoencoder_folder.read(path, "autoencoder_kl", (16, 16, 3)) for path in (folder, file))
    assert (first.network, first.scale) == (second.network, second.scale)
    jax.tree.map(np.testing.assert_array_equal, first.params, second.params)
    for name in FAMILIES[family][1]:
        first, second = (text_folder.read(f"{path}/{name}") for path in (folder, file))
        assert (first.kind, first.config, first.digest) == (second.kind, second.config, second.digest)
        jax.tree.map(np.testing.assert_array_equal, first.params, second.params)


def test_a_file_in_half_precision(pipeline, tmp_path):
    folder, file = pipeline("sdxl")
    half = write_single_file(tmp_path / "half.safetensors", folder, "float16")
    stored = text_folder.read(f"{half}/text_encoder")
    whole = text_folder.read(f"{file}/text_encoder")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(stored.params)} == {"float16"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.float16(b)), stored.params, whole.params)


def written(path, tensors, metadata=None):
    """Writes a file of another tool, and returns its path as a text."""
    safetensors.numpy.save_file({name: np.ascontiguousarray(each) for name, each in tensors.items()}, path, metadata)
    return str(path)


@pytest.fixture(scope="module")
def content(pipeline):
    """Returns the tensors of a file of SDXL, and its metadata."""
    opened = single_file.read(pipeline("sdxl")[1])
    return dict(opened.content), tensor_file.metadata(opened.path)


CONFIGS = "diffusers_configs"
UNET, VAE = "model.diffusion_model.", "first_stage_model."


def test_the_file_of_another_tool(content, tmp_path):
    """Without the configs in the metadata, what names and shapes tell is the same, and the rest that of the family."""
    tensors, metadata = content
    opened = single_file.read(written(tmp_path / "a.safetensors", tensors))
    stored = json.loads(metadata[CONFIGS])
    told = {"block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim", "in_channels",
            "transformer_layers_per_block", "use_linear_projection", "addition_embed_type",
            "projection_class_embeddings_input_dim"}  # fmt: skip
    assert {key: opened.config("unet")[key] for key in told} == {key: stored["unet"][key] for key in told}
    assert opened.config("unet")["sample_size"] == 128 and opened.config("vae")["sample_size"] == 256
    assert (opened.config("vae")["scaling_factor"], opened.config("vae")["latent_channels"]) == (0.13025, 4)
    told = {"architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act",
            "projection_dim"}  # fmt: skip
    config = opened.config("text_encoder_2")
    assert {key: config[key] for key in told} == {key: stored["text_encoder_2"].get(key, config[key]) for key in told}
    scheduler = opened.config("scheduler")
    expected = "EulerDiscreteScheduler", "leading", 1, "epsilon"
    assert (
        tuple(scheduler[key] for key in ("_class_name", "timestep_spacing", "steps_offset", "prediction_type"))
        == expected
    )
    assert opened.config("model_index")["_class_name"] == "StableDiffusionXLPipeline"


def test_the_resolution_of_the_metadata(content, tmp_path):
    path = written(tmp_path / "a.safetensors", content[0], {"modelspec.resolution": "64x64"})
    assert single_file.read(path).config("unet")["sample_size"] == 32


def test_what_the_model_predicts(content, tmp_path):
    tensors, _ = content
    marker = np.zeros(1, np.float32)
    for added, metadata, prediction in (
        ({"v_pred": marker, "ztsnr": marker}, {}, "v_prediction"),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction"),
        ({}, {"modelspec.prediction_type": "epsilon"}, "epsilon"),
    ):
        config = single_file.read(written(tmp_path / "a.safetensors", tensors | added, metadata)).config("scheduler")
        assert config["prediction_type"] == prediction
        assert config.get("rescale_betas_zero_snr", False) == ("ztsnr" in added)
    path = written(tmp_path / "a.safetensors", tensors | {"v_pred": marker}, {"modelspec.prediction_type": "epsilon"})
    with refused("folder") as caught:
        single_file.read(path)
    assert "v_pred" in str(caught.value) and "modelspec.prediction_type" in str(caught.value)


@pytest.mark.parametrize(("deviation", "step", "prediction"), [
    (0.2, None, "v_prediction"), (0.05, None, "epsilon"), (0.2, 875000, "epsilon"),
])  # fmt: skip
def test_what_stable_diffusion_2_predicts(deviation, step, prediction):
    bias = deviation * np.tile([1, -1], 160).astype(np.float32)
    unet = {"output_blocks.11.1.transformer_blocks.0.norm1.bias": bias}
    content = {} if step is None else {"global_step": np.array(step)}
    assert single_file.prediction_of("path", content, unet, {}, {}, "sd2") == prediction
    assert single_file.prediction_of("path", {}, unet, {}, {}, "sd1") == "epsilon"


@pytest.mark.parametrize(
    ("change", "part", "field"),
    [
        (lambda found: {"lora_unet_x.lora_up.weight": np.zeros(2)}, "unet", "folder"),
        (lambda found: {"double_blocks.0.img_attn.qkv.weight": np.zeros(2)}, "unet", "folder"),
        (lambda found: {"some.weight": np.zeros(2)}, "unet", "folder"),
        (lambda found: {name: each for name, each in found.items() if name[:6] != "first_"}, "vae", "folder"),
        (lambda found: {name: each for name, each in found.items() if ".in_layers.2" not in name}, "unet",
         "tensors.mid_block.resnets.0.conv1.weight"),
        (lambda found: found | {f"{UNET}out.0.bias": np.zeros(3, np.float32)}, "unet", "tensors.conv_norm_out.bias"),
        (lambda found: found | {f"{UNET}out.0.bias": np.full(8, np.nan, np.float32)}, "unet",
         "tensors.conv_norm_out.bias"),
        (lambda found: found | {f"{UNET}out.5.bias": np.zeros(3, np.float32)}, "unet", "tensors.out.5.bias"),
        (lambda found: found | {f"{UNET}label_emb.weight": np.zeros((3, 4))}, "unet", "tensors.label_emb.weight"),
    ],
    ids=["LoRA", "Flux", "unknown", "no VAE", "missing", "shape", "NaN", "extra", "upscaler"],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_refused(change, part, field, content, tmp_path):
    tensors, metadata = content
    path = written(tmp_path / "a.safetensors", change(tensors), metadata)
    with refused(field):
        diffusers_models.read(f"{path}/{part}")


def test_another_number_of_channels_is_refused(content, tmp_path):
    name = f"{UNET}input_blocks.0.0.weight"
    path = written(tmp_path / "a.safetensors", content[0] | {name: np.zeros((8, 7, 3, 3), np.float32)})
    with refused("tensors.input_blocks.0.0.weight"):
        single_file.read(path)


def test_a_damaged_file_is_refused(pipeline, tmp_path):
    data = pathlib.Path(pipeline("sdxl")[1]).read_bytes()
    path = tmp_path / "a.safetensors"
    for damaged in (data[:-10], data[:100], b""):
        path.write_bytes(damaged)
        with refused("folder"):
            single_file.read(str(path))
        with refused("path"):
            autoencoder_folder.read(str(path), "autoencoder_kl", (16, 16, 3))


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_numbers_that_cannot_be_written_are_refused(value, tmp_path):
    path = tmp_path / "a.safetensors"
    with refused("tensors.x" if np.isnan(value) else "dtype"):
        tensor_file.write(str(path), {"x": np.float32([1, value])}, "float16", {})
    assert not [*tmp_path.iterdir()]


def test_a_file_needs_a_tokenizer(pipeline):
    """It may be that of any pipeline; each encoder has its own padding."""
    folder, file = pipeline("sdxl")
    options = {"name": "joined", "layout": "sdxl"}
    with refused("text_encoders.tokenizer"):
        build("text_encoders", options | {"path": file})
    expected = build("text_encoders", options | {"path": folder}).tokenize(["a b"])
    for tokenizer in (folder, f"{folder}/tokenizer"):
        found = build("text_encoders", options | {"path": file, "tokenizer": tokenizer}).tokenize(["a b"])
        jax.tree.map(np.testing.assert_array_equal, found, expected)
