"""Names of tensors in the original layout of Stable Diffusion, that of the code of latent diffusion, and in models of
diffusers and transformers, which are the same tensors by other names.

A table maps the layers of a model of diffusers to those of the original layout, without the prefix that the names in a
file of several models have:

part       class                                         prefix in a file
unet       UNet2DConditionModel                          model.diffusion_model.
vae        AutoencoderKL                                 first_stage_model.
clip       CLIPTextModel with OpenAI's weights           cond_stage_model.transformer. (1.x)
                                                         conditioner.embedders.0.transformer. (SDXL)
open_clip  CLIPTextModel, CLIPTextModelWithProjection    cond_stage_model.model. (2.x)
           with OpenCLIP's weights                       conditioner.embedders.1.model. (SDXL; 0 in its refiner)

Sources: `openaimodel.py` and `model.py` of CompVis/latent-diffusion, `model.py` of OpenCLIP.
"""

import re
from collections.abc import Iterable
from typing import Literal

import numpy as np

from diffusion.core.tensors import Tensors, current_name
from diffusion.core.types import InputError

Part = Literal["unet", "vae", "clip", "open_clip"]
Table = dict[str, str]

_UNET = {
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",  # latent consistency; the original layout has no name for it
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
_RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
           "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
_VAE_RESNET = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"conv_shortcut": "nin_shortcut"}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_CLIP = {
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm": "ln_final", "text_projection.weight": "text_projection",
}  # fmt: skip
_CLIP_BLOCK = {"layer_norm1": "ln_1", "self_attn.out_proj": "attn.out_proj", "layer_norm2": "ln_2",
               "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}  # fmt: skip
_QKV = [f"self_attn.{name}_proj" for name in "qkv"]
_DOWN, _TEXT_BLOCK = r"input_blocks\.(\d+)\.0\.op\.", r"text_model\.encoder\.layers\.(\d+)\."
# Tensors of files that no model needs: constants, averages, and parts of the loss of an autoencoder.
_IGNORED = {
    "unet": r"$^",
    "vae": r"loss\.|model_ema\.",
    "clip": r"(text_model\.)?embeddings\.position_ids|logit_scale|text_projection",
    "open_clip": r"logit_scale|attn_mask",
}


def to_diffusers(part: Part, tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns the tensors of a model by their names in diffusers or transformers, as views.

    Args:
      part: The model.
      tensors: Its tensors in the original layout, without the prefix.

    Raises:
      InputError: A tensor belongs to no layer of the model.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not re.match(_IGNORED[part], name)}
    if part == "clip":
        return {_with_prefix(name): tensor for name, tensor in kept.items()}
    table = {original: layer for layer, original in _table(part, kept, original=True).items()}
    found = {}
    for name, tensor in kept.items():
        if fused := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name):
            block, kind = f"text_model.encoder.layers.{fused[1]}", fused[2]
            found |= {f"{block}.{layer}.{kind}": third
                      for layer, third in zip(_QKV, np.array_split(tensor, 3), strict=True)}  # fmt: skip
            continue
        if name == "text_projection":
            tensor = tensor.T
        elif part == "vae" and ".attn_1." in name and tensor.shape[2:] == (1, 1):  # a 1x1 convolution
            tensor = tensor[:, :, 0, 0]
        found[_renamed(name, table)] = tensor
    return found


def to_original(part: Part, tensors: Tensors) -> dict[str, np.ndarray]:
    """Returns the tensors of a model by their names in the original layout; the inverse of `to_diffusers`.

    Args:
      part: The model.
      tensors: Its tensors by their names in diffusers or transformers.

    Raises:
      InputError: The original layout has no name for a tensor.
    """
    if part in ("clip", "open_clip"):
        tensors = {_with_prefix(name): tensor for name, tensor in tensors.items() if "position_ids" not in name}
    if part == "clip":
        return {name: tensor for name, tensor in tensors.items() if name != "text_projection.weight"}
    tensors = {current_name(name): tensor for name, tensor in tensors.items()}
    table, found = _table(part, tensors, original=False), {}
    for name, tensor in tensors.items():
        if query := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)", name):
            block, kind = query.groups()
            fused = [tensors[f"text_model.encoder.layers.{block}.{layer}.{kind}"] for layer in _QKV]
            found[f"transformer.resblocks.{block}.attn.in_proj_{kind}"] = np.concatenate(fused)
            continue
        if name == "text_projection.weight":
            tensor = tensor.T
        elif part == "vae" and ".attentions." in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        found[_renamed(name, table)] = tensor
    return found


def levels_of(names: Iterable[str]) -> tuple[int, list[bool]]:
    """Returns how many residual blocks each level of a U-Net in the original layout has, and which levels attend."""
    blocks, levels = count(names, r"input_blocks\.(\d+)\.0\.in_layers\."), 1 + count(names, _DOWN)
    if not blocks or blocks % levels:
        problem = f"has {blocks} residual blocks on {levels} levels; every level must have the same number of them"
        raise InputError("tensors.input_blocks", problem)
    layers = blocks // levels
    return layers, [f"input_blocks.{level * (layers + 1) + 1}.1.norm.weight" in names for level in range(levels)]


def count(names: Iterable[str], pattern: str) -> int:
    """Returns how many different numbers a pattern finds at the start of names."""
    return len({match[1] for name in names if (match := re.match(pattern, name))})


def _table(part: Part, names: Iterable[str], *, original: bool) -> Table:
    """Returns the layers of a model and their names in the original layout, given the names of tensors of one kind."""
    if part == "open_clip":
        return _open_clip(count(names, r"transformer\.resblocks\.(\d+)\." if original else _TEXT_BLOCK))
    if part == "vae":
        down, block = ("down", "block") if original else ("down_blocks", "resnets")
        layers = count(names, rf"encoder\.{down}\.0\.{block}\.(\d+)\.")
        return _vae(count(names, rf"encoder\.{down}\.(\d+)\."), layers)
    if original:
        return _unet(*levels_of(names))
    levels = range(count(names, r"down_blocks\.(\d+)\."))
    attends = [f"down_blocks.{level}.attentions.0.norm.weight" in names for level in levels]
    return _unet(count(names, r"down_blocks\.0\.resnets\.(\d+)\."), attends)


def _unet(layers: int, attends: list[bool]) -> Table:
    """Returns the table of a U-Net with a number of residual blocks per level."""
    table = dict(_UNET)

    def resnet(layer: str, original: str) -> None:
        table.update({f"{layer}.{inner}": f"{original}.{other}" for inner, other in _RESNET.items()})

    for level, attention in enumerate(attends):
        start = level * (layers + 1)
        for index in range(layers):
            resnet(f"down_blocks.{level}.resnets.{index}", f"input_blocks.{start + index + 1}.0")
            if attention:
                table[f"down_blocks.{level}.attentions.{index}"] = f"input_blocks.{start + index + 1}.1"
        table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{start + layers + 1}.0.op"
    resnet("mid_block.resnets.0", "middle_block.0")
    table["mid_block.attentions.0"] = "middle_block.1"
    resnet("mid_block.resnets.1", "middle_block.2")
    for level, attention in enumerate(reversed(attends)):
        start = level * (layers + 1)
        for index in range(layers + 1):
            resnet(f"up_blocks.{level}.resnets.{index}", f"output_blocks.{start + index}.0")
            if attention:
                table[f"up_blocks.{level}.attentions.{index}"] = f"output_blocks.{start + index}.1"
        upsampler = f"output_blocks.{start + layers}.{1 + attention}.conv"
        table[f"up_blocks.{level}.upsamplers.0.conv"] = upsampler
    return table


def _vae(levels: int, layers: int) -> Table:
    """Returns the table of an autoencoder, whose decoder has one block more on each level than its encoder."""
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}

    def block(layer: str, original: str, inner: Table) -> None:
        table.update({f"{layer}.{name}": f"{original}.{other}" for name, other in inner.items()})

    for half in ("encoder", "decoder"):
        block(half, half, {"conv_in": "conv_in", "conv_norm_out": "norm_out", "conv_out": "conv_out"})
        for index in range(2):
            block(f"{half}.mid_block.resnets.{index}", f"{half}.mid.block_{index + 1}", _VAE_RESNET)
        block(f"{half}.mid_block.attentions.0", f"{half}.mid.attn_1", _VAE_ATTENTION)
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{level}"
        original_down, original_up = f"encoder.down.{level}", f"decoder.up.{levels - 1 - level}"
        for index in range(layers):
            block(f"{down}.resnets.{index}", f"{original_down}.block.{index}", _VAE_RESNET)
        for index in range(layers + 1):
            block(f"{up}.resnets.{index}", f"{original_up}.block.{index}", _VAE_RESNET)
        table[f"{down}.downsamplers.0.conv"] = f"{original_down}.downsample.conv"
        table[f"{up}.upsamplers.0.conv"] = f"{original_up}.upsample.conv"
    return table


def _open_clip(layers: int) -> Table:
    """Returns the table of OpenCLIP's text model, without queries, keys and values, which it stores as one tensor."""
    blocks = {f"text_model.encoder.layers.{index}.{layer}": f"transformer.resblocks.{index}.{original}"
              for index in range(layers) for layer, original in _CLIP_BLOCK.items()}  # fmt: skip
    return _CLIP | blocks


def _renamed(name: str, table: Table) -> str:
    """Returns the other name of a tensor, by the longest of its layers that a table has."""
    layer = name
    while layer not in table:
        layer = layer.rpartition(".")[0]
        if not layer:
            raise InputError(f"tensors.{name}", "belongs to no layer of Stable Diffusion")
    return table[layer] + name[len(layer) :]


def _with_prefix(name: str) -> str:
    """Returns the name of a tensor of CLIP with the prefix that transformers 5.6 leaves out."""
    return name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}"
