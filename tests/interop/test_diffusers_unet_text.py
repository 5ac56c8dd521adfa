"""`UNet2DConditionModel` folders of diffusers can be written and read back, and have the tensors of published models.
With diffusers installed (`make parity`), outputs, gradients and weights agree with its models."""

import dataclasses
import gzip
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core import model_folder, trees
from diffusion.core.build import build_network
from diffusion.core.tensors import to_native
from diffusion.core.types import ArraySpec, ConditionSpec, Spec, Text, class_labels
from diffusion.interop import diffusers_models as models
from diffusion.interop import diffusers_unet_text
from diffusion.interop.diffusers_models import Model
from diffusion.pipelines.config import read_config
from diffusion.pipelines.conversion import export_run, import_folder
from diffusion.pipelines.run import open_run
from tests.interop.test_diffusers_models import load_foreign, peer
from tests.published import published
from tests.refusals import refused
from tests.tiers import slow_except

TINY = {"name": "unet_text", "width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "depth": (1, 0), "num_heads": 2,
        "groups": 4}  # fmt: skip
TEXT = {"text": ConditionSpec("text", (77, 12))}
SDXL = {"text": ConditionSpec("text", (77, 12), pooled=5), "time_ids": ConditionSpec("vector", (6,))}
# For each case: options, conditions, and the height and width.
CASES = {
    "as Stable Diffusion": ({"num_res_blocks": 2, "depth": (1, 0)}, TEXT, (8, 8)),
    "unequal heads": ({"depth": (1, 1), "num_heads": (2, 4), "use_linear_projection": True}, TEXT, (8, 8)),
    "three levels": ({"channel_mult": (1, 2, 2), "depth": (0, 1, 0), "num_heads": 4, "upcast_attention": True}, TEXT,
                     (8, 8)),
    "odd and not square": ({"channel_mult": (1, 1, 2), "depth": (1, 1, 1)}, TEXT, (7, 10)),
    "as SDXL": ({"depth": (1, 2), "middle_depth": 2, "num_heads": (2, 4), "number_features": 8,
                 "use_linear_projection": True}, SDXL, (8, 8)),
    "as SDXL's refiner": ({"number_features": 8}, {"text": ConditionSpec("text", (77, 12), pooled=12),
                          "time_ids": ConditionSpec("vector", (5,))}, (8, 8)),
    "latent consistency": ({"scalar_conditions": ("guidance_scale",), "guidance_features": 6}, TEXT, (8, 8)),
    "as the upscaler": ({"only_cross_attention": (True, False), "depth": (1, 1), "null_class": False},
                        {**class_labels(5), **TEXT, "image": ConditionSpec("image", (8, 8, 3))}, (8, 8)),
    "recorded": ({"number_features": 4, "depth": (0, 1)}, SDXL, (3, 5)),
    "other options": ({"scale_shift": True, "outputs": 2, "epsilon": 1e-3, "freq_shift": 1, "sin_first": True}, TEXT,
                      (8, 8)),
}  # fmt: skip


def every(default):
    """Parametrizes a test with all cases, of which those not named in `default` are slow."""
    ids = [name.replace(" ", "_") for name in CASES]
    return pytest.mark.parametrize("case", slow_except(default, CASES), ids=ids)


def model_of(case):
    """Returns a network, and a model of it without zeros."""
    options, conditions, size = CASES[case]
    network, spec = TINY | options, Spec(ArraySpec((*size, 4), "latent"), conditions)
    built = build_network(network, spec)
    rng = np.random.default_rng(0)

    def draw(path, like):
        values = rng.normal(size=like.shape).astype(np.float32) / 4
        return values + 1 if trees.path_name(path).endswith("scale") else values

    shapes = jax.eval_shape(built.init, jax.random.key(0))
    return built, Model(network, spec, jax.tree_util.tree_map_with_path(draw, shapes))


@every(default=("as SDXL", "as the upscaler"))
def test_written_and_read_back(case, tmp_path):
    _, model = model_of(case)
    models.write(str(tmp_path), model)
    read = models.read(str(tmp_path))
    assert read.spec == model.spec
    assert models.with_defaults(read.network) == models.with_defaults(model.network)
    jax.tree.map(np.testing.assert_array_equal, read.params, model.params)


@pytest.mark.parametrize(
    ("folder", "name", "millions"),
    [
        ("runwayml/stable-diffusion-v1-5", "sd15_unet", 859.5),
        pytest.param("stabilityai/stable-diffusion-2-1", "sd21_unet", 865.9, marks=pytest.mark.slow),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl_unet", 2567.5),
    ],
)
def test_published_models_have_these_tensors(folder, name, millions):
    config = model_folder.read_json(str(published(folder, "unet")), "config.json")
    with gzip.open(published("names_and_shapes.json.gz")) as file:
        expected = {key: tuple(shape) for key, shape in json.load(file)[name].items()}
    network, spec = diffusers_unet_text.network_of(config, {}, False)
    params = jax.eval_shape(build_network(network, spec).init, jax.random.key(0))
    flat, found = trees.by_path(params), {}
    for pair in models.pairs(network, spec):
        parts = pair.split(np.broadcast_to(np.float32(0), flat.pop(pair.native).shape))
        found |= {key: part.shape for key, part in zip(pair.foreign, parts, strict=True)}
    assert found == expected and not flat
    assert round(sum(math.prod(shape) for shape in found.values()) / 1e6, 1) == millions
    written = diffusers_unet_text.config_of(models.with_defaults(network), spec, params)
    different = {key for key, value in config.items() if written[key] != value and (written[key] or value)}
    assert different == {"_diffusers_version"}


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"sample_size": None}, "sample_size"),
        ({"center_input_sample": True}, "center_input_sample"),
        ({"down_block_types": ["CrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}, "up_block_types"),
        ({"up_block_types": ["CrossAttnUpBlock2D"]}, "up_block_types"),
        ({"mid_block_type": None}, "mid_block_type"),
        ({"block_out_channels": [8, 15]}, "norm_num_groups"),
        ({"layers_per_block": [1, 2]}, "layers_per_block"),
        ({"downsample_padding": 0}, "downsample_padding"),
        ({"act_fn": "gelu"}, "act_fn"),
        ({"norm_num_groups": None}, "norm_num_groups"),
        ({"cross_attention_dim": [12, 13]}, "cross_attention_dim"),
        ({"cross_attention_dim": None}, "cross_attention_dim"),
        ({"transformer_layers_per_block": [1, [1, 2]]}, "transformer_layers_per_block"),
        ({"reverse_transformer_layers_per_block": [1, 2]}, "reverse_transformer_layers_per_block"),
        ({"encoder_hid_dim": 5}, "encoder_hid_dim"),
        ({"encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type"),
        ({"attention_head_dim": 3}, "attention_head_dim"),
        ({"attention_head_dim": [2]}, "attention_head_dim"),
        ({"num_attention_heads": 2}, "num_attention_heads"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"addition_embed_type": "text_image"}, "addition_embed_type"),
        ({"addition_embed_type": "text_time"}, "projection_class_embeddings_input_dim"),
        (
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 48,
            },
            "projection_class_embeddings_input_dim",
        ),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift"),
        ({"resnet_skip_time_act": True}, "resnet_skip_time_act"),
        ({"resnet_out_scale_factor": 1.4}, "resnet_out_scale_factor"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"time_embedding_dim": 99}, "time_embedding_dim"),
        ({"time_embedding_act_fn": "silu"}, "time_embedding_act_fn"),
        ({"timestep_post_act": "silu"}, "timestep_post_act"),
        ({"time_cond_proj_dim": 7}, "time_cond_proj_dim"),
        ({"conv_in_kernel": 1}, "conv_in_kernel"),
        ({"conv_out_kernel": 1}, "conv_out_kernel"),
        ({"attention_type": "gated"}, "attention_type"),
        ({"class_embeddings_concat": True}, "class_embeddings_concat"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm"),
        ({"out_channels": 5}, "out_channels"),
    ],
)
def test_a_model_that_is_not_supported_is_refused(config, field, tmp_path):
    content = {
        "_class_name": "UNet2DConditionModel", "sample_size": 8, "block_out_channels": [8, 16], "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "norm_num_groups": 4, "cross_attention_dim": 12,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "attention_head_dim": 2,
    }  # fmt: skip
    model_folder.write(str(tmp_path), content | config, {})
    with refused(f"config.json.{field}"):
        models.read(str(tmp_path))


@pytest.mark.slow
def test_a_model_becomes_a_run_and_the_run_a_model(tmp_path):
    """A scheduler next to the model determines objective and sampler."""
    _, model = model_of("as Stable Diffusion")
    models.write(str(tmp_path / "model"), model)
    scheduler = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085,
                 "beta_end": 0.012, "skip_prk_steps": True, "steps_offset": 1, "set_alpha_to_one": False}  # fmt: skip
    model_folder.write_json(str(tmp_path / "model"), "scheduler_config.json", scheduler)
    config = read_config("configs/imagenet256_dit.py:XL/2")
    import_folder(str(tmp_path / "model"), str(tmp_path / "run"), lambda *of: config)
    run = open_run(str(tmp_path / "run"))
    assert run.config["sampler"]["name"] == "pndm" and run.spec == model.spec
    assert run.config["objective"]["schedule"]["betas"] == "scaled_linear"
    assert "text encoder" in export_run(str(tmp_path / "run"), str(tmp_path / "folder"))
    read = models.read(str(tmp_path / "folder"))
    jax.tree.map(np.testing.assert_array_equal, read.params, model.params)


@pytest.mark.parametrize(
    ("options", "conditions", "field"),
    [
        ({"groups": None}, TEXT, "network.groups"),
        ({"channel_mult": (2, 4)}, TEXT, "network.channel_mult"),
        ({"middle_depth": 0}, TEXT, "network.middle_depth"),
        ({"depth": (1, 2)}, TEXT, "network.middle_depth"),
        ({"scalar_conditions": ("step_size",)}, TEXT, "network.scalar_conditions"),
        ({"outputs": 2}, TEXT | {"image": ConditionSpec("image", (8, 8, 4))}, "network.outputs"),
        ({}, {}, "data.conditions"),
        ({}, TEXT | {"score": ConditionSpec("scalar")}, "data.conditions"),
        ({}, TEXT | {"time_ids": ConditionSpec("vector", (6,))}, "data.conditions"),
        ({}, {"text": SDXL["text"]}, "data.conditions"),
    ],
)
def test_options_that_diffusers_lacks_are_refused(options, conditions, field):
    network = models.with_defaults(TINY | options)
    norms = {name: {"scale": np.ones(width)} for name, width in (("narrow", 8), ("wide", 32))}
    with refused(field):
        diffusers_unet_text.config_of(network, Spec(ArraySpec((8, 8, 4), "latent"), conditions), norms)


# A small model with weights in closed form, whose output diffusers computed.

RECORDED_OUTPUT = (0.415593, 0.103829, -0.060210, 0.098472)  # of diffusers 0.42.1 at [1, 2, :4, 1]


def recorded():
    """Returns a network, its model and inputs: a text with padding, SDXL's numbers and a size that is odd."""
    built, model = model_of("recorded")
    rng = np.random.RandomState(0)  # its stream never changes
    params = jax.tree.map(lambda leaf: (rng.uniform(-1, 1, leaf.shape) / 2).astype(np.float32), model.params)
    return built, Model(model.network, model.spec, params), inputs_of(model, 2, np.random.RandomState(1))


def test_the_output_is_the_one_recorded():
    built, model, (x, t, cond) = recorded()
    out = jax.jit(built.apply)(model.params, x, t.astype(np.float32), cond)
    np.testing.assert_allclose(out[1, 2, :4, 1], RECORDED_OUTPUT, atol=1e-4)


# Comparison with diffusers.


@pytest.mark.peers
@peer
def test_the_recorded_output_is_that_of_diffusers(tmp_path):
    _, model, inputs = recorded()
    models.write(str(tmp_path), model)
    out = call_foreign(load_foreign(tmp_path).eval(), *inputs)
    np.testing.assert_allclose(out.detach().numpy()[1, 2, :4, 1], RECORDED_OUTPUT, atol=1e-5)


def inputs_of(model, batch, rng):
    """Returns x, c_noise and the conditions, with two tokens of padding in the second example.

    With only_cross_attention there is no padding, because diffusers applies the mask to the second attention alone.
    """
    specs = model.spec.conditions
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    x, t = normal(batch, *model.spec.shape), np.linspace(999, 3, batch).astype(np.int64)
    L, D = specs["text"].shape
    has_padding = (np.arange(batch) == 1) & (not model.network.get("only_cross_attention"))
    mask = np.arange(L) < np.where(has_padding, L - 2, L)[:, None]
    pooled = specs["text"].pooled
    cond = {"text": Text(normal(batch, L, D), mask, normal(batch, pooled) if pooled else None)}
    if "time_ids" in specs:
        cond["time_ids"] = (1024 * rng.uniform(size=(batch, *specs["time_ids"].shape))).astype(np.float32)
    if "label" in specs:
        cond["label"] = np.arange(batch) % specs["label"].num_classes
    if "image" in specs:
        cond["image"] = normal(batch, *specs["image"].shape)
    if model.network.get("scalar_conditions"):
        cond["guidance_scale"] = np.linspace(7.5, 1, batch).astype(np.float32)
    return x, t, cond


def call_foreign(other, x, t, cond):
    """Returns the output `[B, H, W, C]` of a model of diffusers, as a tensor."""
    import torch
    from diffusers import StableDiffusionPipeline

    image = [cond["image"]] if "image" in cond else []
    x = torch.tensor(np.concatenate([x, *image], axis=-1).transpose(0, 3, 1, 2))
    more = {}
    if "time_ids" in cond:
        pooled, ids = torch.tensor(cond["text"].pooled), torch.tensor(cond["time_ids"])
        more["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": ids}
    if "label" in cond:
        more["class_labels"] = torch.tensor(cond["label"])
    if "guidance_scale" in cond:
        more["timestep_cond"] = StableDiffusionPipeline.get_guidance_scale_embedding(
            None, torch.tensor(cond["guidance_scale"]) - 1, other.config.time_cond_proj_dim
        )
    text, mask = torch.tensor(cond["text"].tokens), torch.tensor(cond["text"].mask)
    return other(x, torch.tensor(t), text, encoder_attention_mask=mask, **more).sample.permute(0, 2, 3, 1)


@pytest.mark.peers
@peer
@every(default=())
def test_outputs_and_gradients_agree(case, tmp_path):
    """diffusers loads a model that was written, gives the same output and gradients, and saves the same weights."""
    import torch

    built, model = model_of(case)
    models.write(str(tmp_path), model)
    other = load_foreign(tmp_path).eval()
    rng = np.random.default_rng(1)
    x, t, cond = inputs_of(model, 2, rng)
    expected = call_foreign(other, x, t, cond)
    g = rng.normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(g)).sum().backward()

    def value(params):
        out = built.apply(params, x, t.astype(np.float32), cond)
        return jnp.sum(out * g), out

    (_, out), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(model.params)
    expected = expected.detach().numpy()
    np.testing.assert_allclose(out, expected, atol=1e-4 * abs(expected).max())
    gradients, flat = {name: p.grad.numpy() for name, p in other.named_parameters()}, trees.by_path(gradient)
    for pair in models.pairs(model.network, model.spec):
        expected = pair.join([gradients[name] for name in pair.foreign])
        np.testing.assert_allclose(flat[pair.native], expected, atol=1e-3 * abs(expected).max(), err_msg=pair.native)

    other.save_pretrained(tmp_path / "back")
    read = models.read(str(tmp_path / "back"))
    jax.tree.map(np.testing.assert_array_equal, read.params, model.params)


@pytest.mark.slow
@pytest.mark.peers
@peer
def test_the_full_size_agrees():
    """Stable Diffusion 1.5 with random weights, at 16 x 16."""
    import diffusers
    import torch

    config = model_folder.read_json(str(published("runwayml/stable-diffusion-v1-5", "unet")), "config.json")
    network, spec = diffusers_unet_text.network_of(config, {}, False)
    torch.manual_seed(0)
    other = diffusers.UNet2DConditionModel.from_config(config).eval()
    foreign = {name: tensor.numpy() for name, tensor in other.state_dict().items()}
    built = build_network(network, spec)
    params = to_native(models.pairs(network, spec), foreign, jax.eval_shape(built.init, jax.random.key(0)))
    small = dataclasses.replace(spec, x=ArraySpec((16, 16, 4), "latent"))
    x, t, cond = inputs_of(Model(network, small, params), 1, np.random.default_rng(1))
    with torch.no_grad():
        expected = call_foreign(other, x, t, cond).numpy()
    out = jax.jit(built.apply)(params, x, t.astype(np.float32), cond)
    np.testing.assert_allclose(out, expected, atol=1e-3 * abs(expected).max())
