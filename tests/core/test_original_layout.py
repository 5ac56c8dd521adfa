"""Names in the original layout of Stable Diffusion and in diffusers are the same tensors, for published models. With
diffusers installed (`make parity`), they are those that its own conversion gives."""

import gzip
import importlib.util
import json

import numpy as np
import pytest

from diffusion.core.original_layout import to_diffusers, to_original
from tests.published import published
from tests.refusals import refused

# For each model with published names, its part, and a few of its tensors in the original layout with their shapes.
MODELS = {
    "sd15_unet": ("unet", {
        "input_blocks.0.0.weight": (320, 4, 3, 3), "time_embed.2.bias": (1280,), "input_blocks.3.0.op.bias": (320,),
        "input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1), "input_blocks.11.0.in_layers.2.bias": (1280,),
        "input_blocks.8.1.transformer_blocks.0.attn2.to_k.weight": (1280, 768), "output_blocks.2.1.conv.bias": (1280,),
        "middle_block.1.proj_in.weight": (1280, 1280, 1, 1), "output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.11.1.norm.weight": (320,), "output_blocks.11.0.emb_layers.1.weight": (320, 1280),
        "out.2.weight": (4, 320, 3, 3),
    }),
    "sd21_unet": ("unet", {"input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
                           "output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,)}),
    "sdxl_unet": ("unet", {"label_emb.0.0.weight": (1280, 2816), "input_blocks.8.1.transformer_blocks.9.norm3.bias":
                           (1280,), "output_blocks.2.2.conv.bias": (1280,), "output_blocks.5.2.conv.bias": (640,)}),
    "sd15_vae": ("vae", {
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1), "encoder.mid.attn_1.norm.weight": (512,),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1), "encoder.down.2.downsample.conv.bias": (512,),
        "decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1), "decoder.up.3.upsample.conv.bias": (512,),
        "decoder.mid.block_2.conv2.bias": (512,), "decoder.norm_out.bias": (128,), "quant_conv.bias": (8,),
    }),
    "clipL": ("clip", {"text_model.encoder.layers.11.mlp.fc1.bias": (3072,)}),
    "clipH": ("open_clip", {
        "transformer.resblocks.22.attn.in_proj_weight": (3072, 1024), "positional_embedding": (77, 1024),
        "transformer.resblocks.0.attn.out_proj.bias": (1024,), "transformer.resblocks.0.mlp.c_proj.bias": (1024,),
        "transformer.resblocks.0.ln_2.weight": (1024,), "ln_final.bias": (1024,),
    }),
    "clipG": ("open_clip", {"text_projection": (1280, 1280), "token_embedding.weight": (49408, 1280)}),
}  # fmt: skip


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", MODELS)
def test_the_names_of_published_models(name):
    """Every tensor has one name in the other layout, and gets its own back."""
    part, expected = MODELS[name]
    with gzip.open(published("names_and_shapes.json.gz")) as file:
        shapes = json.load(file)[name]
    tensors = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
    if part in ("clip", "open_clip"):
        tensors = {key if key.startswith("text_") else f"text_model.{key}": each for key, each in tensors.items()}
    original = to_original(part, tensors)
    found = shapes_of(original)
    assert {key: found.get(key) for key in expected} == expected
    assert shapes_of(to_diffusers(part, original)) == shapes_of(tensors)
    fused = sum("in_proj" in key for key in original)
    assert len(original) == len(tensors) - 2 * fused


def random_tensors(shapes):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


CLIP_BLOCK = "text_model.encoder.layers.0"


def test_fused_and_transposed_tensors_of_open_clip():
    tensors = random_tensors({f"{CLIP_BLOCK}.self_attn.{name}_proj.weight": (6, 6) for name in "qkv"})
    tensors["text_projection.weight"] = np.arange(24.0).reshape(4, 6)
    original = to_original("open_clip", tensors)
    query, key, value = (tensors[f"{CLIP_BLOCK}.self_attn.{name}_proj.weight"] for name in "qkv")
    fused = original["transformer.resblocks.0.attn.in_proj_weight"]
    np.testing.assert_array_equal(fused, np.concatenate([query, key, value]))
    np.testing.assert_array_equal(original["text_projection"], tensors["text_projection.weight"].T)
    back = to_diffusers("open_clip", original)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


def test_other_spellings():
    """Names without prefix, as of transformers 5.6, those of attention before diffusers 0.13, and what is not read."""
    tensors = {"encoder.layers.0.mlp.fc1.bias": np.zeros(2), "embeddings.position_ids": np.arange(2),
               "text_projection.weight": np.zeros((2, 2))}  # fmt: skip
    assert [*to_original("clip", tensors)] == ["text_model.encoder.layers.0.mlp.fc1.bias"]
    assert [*to_diffusers("clip", tensors)] == ["text_model.encoder.layers.0.mlp.fc1.bias"]
    old = {"encoder.mid_block.attentions.0.proj_attn.weight": np.zeros((2, 2))}
    assert shapes_of(to_original("vae", old)) == {"encoder.mid.attn_1.proj_out.weight": (2, 2, 1, 1)}
    assert to_diffusers("vae", {"loss.logvar": np.zeros(())}) == {}


@pytest.mark.parametrize("name", ["input_blocks.1.0.in_layers.7.weight", "input_blocks.99.0.op.weight", "other"])
def test_an_unknown_tensor_is_refused(name):
    tensors = dict.fromkeys(["input_blocks.1.0.in_layers.0.weight", name], np.zeros(2))
    with refused(f"tensors.{name}" if "99" not in name else "tensors.input_blocks"):
        to_diffusers("unet", tensors)


def test_a_tensor_without_a_name_in_the_original_layout_is_refused():
    with refused("tensors.class_embedding.weight"):
        to_original("unet", {"class_embedding.weight": np.zeros((2, 2))})


# Comparison with diffusers.

PEER = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
UNETS = {
    "first": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 2,
              "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (4, 8)},
    "xl": {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "layers_per_block": 1,
           "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
           "block_out_channels": (4, 8, 8), "transformer_layers_per_block": (1, 2, 3), "use_linear_projection": True,
           "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
           "projection_class_embeddings_input_dim": 32},
}  # fmt: skip


def state_of(model):
    """Returns the tensors of a model of diffusers or transformers, with different random values."""
    return random_tensors({name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})


def with_prefix(prefix, tensors):
    """Returns the tensors of a file."""
    import torch

    return {prefix + name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in tensors.items()}


def assert_same(converted, tensors):
    assert converted.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(converted[name].numpy(), tensor, err_msg=name)


@pytest.mark.peers
@PEER
@pytest.mark.parametrize("case", UNETS)
def test_diffusers_converts_a_unet_back(case):
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    options = {"norm_num_groups": 2, "attention_head_dim": 2, "cross_attention_dim": 6, "sample_size": 8}
    model = diffusers.UNet2DConditionModel(**options, **UNETS[case])
    tensors = state_of(model)
    content = with_prefix("model.diffusion_model.", to_original("unet", tensors))
    assert_same(convert_ldm_unet_checkpoint(content, model.config), tensors)


@pytest.mark.peers
@PEER
def test_diffusers_converts_an_autoencoder_back():
    import diffusers
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    types = {"down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3}
    model = diffusers.AutoencoderKL(block_out_channels=(4, 4, 8), norm_num_groups=2, layers_per_block=2, **types)
    tensors = state_of(model)
    content = with_prefix("first_stage_model.", to_original("vae", tensors))
    assert_same(convert_ldm_vae_checkpoint(content, model.config), tensors)


@pytest.mark.peers
@PEER
def test_diffusers_converts_text_encoders_back():
    import transformers
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    config = transformers.CLIPTextConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2, vocab_size=20,
                                         num_hidden_layers=2, projection_dim=6, bos_token_id=1,
                                         eos_token_id=2)  # fmt: skip
    model = transformers.CLIPTextModelWithProjection(config)
    tensors = state_of(model)
    prefix = "conditioner.embedders.1.model."
    content = with_prefix(prefix, to_original("open_clip", tensors))
    assert_same(convert_open_clip_checkpoint(model, content, prefix), tensors)
    content = with_prefix("cond_stage_model.transformer.", to_original("clip", tensors))
    del tensors["text_projection.weight"]
    assert_same(convert_ldm_clip_checkpoint(content), tensors)
