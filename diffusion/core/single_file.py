"""Reads and writes single files of Stable Diffusion in the original layout, which have all models of a pipeline.

Such a file is read like the folder of a pipeline: the path `sd.safetensors` stands for the folder, and
`sd.safetensors/unet`, `sd.safetensors/vae`, `sd.safetensors/text_encoder`, `sd.safetensors/text_encoder_2` and
`sd.safetensors/scheduler` for those in it. There are no tokenizers.
"""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.core import original_configs, tensor_file
from diffusion.core.original_configs import KINDS, Config
from diffusion.core.original_layout import Part, to_diffusers, to_original
from diffusion.core.tensors import Tensors
from diffusion.core.types import InputError

SUFFIX = ".safetensors"
INDEX = "model_index"  # stands for `model_index.json` among the configs of parts
_PREFIXES: dict[str, tuple[Part, str]] = {
    "unet": ("unet", "model.diffusion_model."),
    "vae": ("vae", "first_stage_model."),
}
_CONFIGS = "diffusers_configs"  # the entry of the metadata with the configs of all parts, as JSON
_PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_EPSILON_STEP = 875000  # `global_step` in files of Stable Diffusion 2 that predict epsilon
_OTHERS = {
    "model.diffusion_model.joint_blocks.": "Stable Diffusion 3", "joint_blocks.": "Stable Diffusion 3",
    "model.diffusion_model.double_blocks.": "Flux", "double_blocks.": "Flux", "control_model.": "a ControlNet",
    "lora_": "a LoRA", "down_blocks.": "a model of diffusers without its folder", "edm_mean": "Playground 2.5",
    "edm_vpred.": "a model with the noise levels of EDM",
}  # fmt: skip


def split(path: str) -> tuple[str, str] | None:
    """Splits the path of a file, or of a part of one, into the path of the file and the name of the part, which is
    empty for the whole file. Returns None for the path of something else."""
    for file, part in ((path, ""), os.path.split(path.rstrip("/"))):
        if file.endswith(SUFFIX) and os.path.isfile(file):
            return file, part
    return None


@dataclasses.dataclass(frozen=True)
class SingleFile:
    """An open file.

    Attributes:
      path: The path of the file.
      kind: The family; see `original_configs.KINDS`.
      configs: The configs of the parts by name: `unet`, `scheduler`, `INDEX`, and those of `vae`, `text_encoder` and
        `text_encoder_2` that the file has.
      content: All tensors by their names in the file, as views of it.
    """

    path: str
    kind: str
    configs: Mapping[str, Config]
    content: Tensors

    def names(self, part: str) -> list[str]:
        """Returns the names of what is in the folder that a part stands for, or in that of the pipeline if empty."""
        if not part:
            return [f"{INDEX}.json", *(name for name in self.configs if name != INDEX)]
        return [f"{part}_config.json" if part == "scheduler" else "config.json"] * (part in self.configs)

    def config(self, part: str) -> Config:
        """Returns the config of a part. Raises InputError, for `folder`, if the file does not have it."""
        if part not in self.configs:
            _, prefix = (_PREFIXES | KINDS[self.kind].encoders).get(part, (None, f"{part}."))
            raise InputError("folder", f"{self.path} has no {part}: no tensor begins with {prefix}")
        return dict(self.configs[part])

    def tensors(self, part: str) -> dict[str, np.ndarray]:
        """Returns the tensors of a model by their names in diffusers or transformers, as views of the file.

        Raises:
          InputError: The file does not have the model, or a tensor belongs to no layer of it.
        """
        config = self.config(part)
        table, prefix = (_PREFIXES | KINDS[self.kind].encoders)[part]
        found = to_diffusers(table, _without_prefix(self.content, prefix))
        if part.startswith("text_encoder"):
            unused = [f"text_model.encoder.layers.{index}." for index in range(config["num_hidden_layers"], 99)]
            found = {name: tensor for name, tensor in found.items() if not name.startswith(tuple(unused))}
        return found


def read(path: str) -> SingleFile:
    """Opens a file and finds the configs of its parts.

    They follow from the tensors (`original_configs`), and from the metadata in a file of `write`.

    Raises:
      InputError: for `folder`; the file cannot be read, is damaged or not in this layout, or contradicts itself about
        what the model predicts. Or for a tensor that is missing.
    """
    content, metadata = tensor_file.read(path, "folder"), tensor_file.metadata(path)
    for start, name in _OTHERS.items():
        if any(key.startswith(start) for key in content):
            raise InputError("folder", f"{path} is {name}; files of Stable Diffusion 1.x, 2.x and XL can be read")
    original = {name: _without_prefix(content, prefix) for name, (_, prefix) in _PREFIXES.items()}
    if not original["unet"]:
        prefix = _PREFIXES["unet"][1]
        raise InputError("folder", f"{path} is not in the original layout: no tensor begins with {prefix}")
    stored = _stored(path, metadata)
    unet = original_configs.unet_config(original["unet"], stored.get("unet", {}).get("attention_head_dim"))
    unet |= stored.get("unet", {})
    first, second = (bool(_without_prefix(content, KINDS[kind].encoders["text_encoder"][1])) for kind in ("sd1", "sd2"))
    kind = original_configs.kind_of(unet, None if first == second else second)
    original |= {name: to_diffusers(part, _without_prefix(content, prefix))
                 for name, (part, prefix) in KINDS[kind].encoders.items()}  # fmt: skip
    prediction = prediction_of(path, content, original["unet"], metadata, stored, kind)
    configs = {"unet": unet}
    if original["vae"]:
        configs["vae"] = original_configs.vae_config(original["vae"], kind)
    for name, (part, _) in KINDS[kind].encoders.items():
        if original[name]:
            configs[name] = original_configs.text_config(part, original[name], kind)
    halvings = len(configs["vae"]["block_out_channels"]) - 1 if "vae" in configs else 3
    side = 96 if kind == "sd2" and prediction == "v_prediction" else KINDS[kind].latent_size
    if resolution := re.fullmatch(r"(\d+)x\1", metadata.get("modelspec.resolution", "")):
        side = int(resolution[1]) >> halvings
    configs["unet"] = {"sample_size": side, **unet}
    if "vae" in configs:
        configs["vae"]["sample_size"] = side << halvings
    configs["scheduler"] = original_configs.scheduler_config(kind, unet, prediction, "ztsnr" in content)
    configs[INDEX] = original_configs.pipeline_config(kind, configs)
    return SingleFile(path, kind, {name: each | stored.get(name, {}) for name, each in configs.items()}, content)


def write(
    path: str, configs: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensors], dtype: str, title: str
) -> None:
    """Writes the models of a pipeline as one file, with metadata of the specification `modelspec` and all configs.

    Args:
      path: The file.
      configs: The configs as in `SingleFile`; that of the U-Net must be complete.
      tensors: The tensors of `unet`, `vae`, `text_encoder` and `text_encoder_2` by their names in diffusers and
        transformers, in any dtype. They are converted and written one after the other.
      dtype: The dtype in the file: `float16`, `bfloat16` or `float32`.
      title: The name of the model, for the metadata.

    Raises:
      InputError: A tensor has no name in the original layout, is not finite, or is too large for the dtype.
    """
    encoder = configs.get("text_encoder", configs.get("text_encoder_2"))
    kind = original_configs.kind_of(configs["unet"], None if encoder is None else encoder.get("hidden_act") == "gelu")
    content = {}
    for name, (part, prefix) in (_PREFIXES | KINDS[kind].encoders).items():
        if name in tensors:
            content |= {prefix + key: tensor for key, tensor in to_original(part, tensors[name]).items()}
    scheduler = configs["scheduler"]
    predicts_v = scheduler["prediction_type"] == "v_prediction"
    if predicts_v:
        content["v_pred"] = np.zeros(1, np.float32)
        if scheduler.get("rescale_betas_zero_snr"):
            content["ztsnr"] = np.zeros(1, np.float32)
    stored = {name: {key: value for key, value in config.items() if _is_stored(key)}
              for name, config in configs.items()}  # fmt: skip
    side = configs["unet"]["sample_size"]
    height, width = (side, side) if isinstance(side, int) else side
    halvings = len(configs["vae"]["block_out_channels"]) - 1
    architecture = KINDS[kind].architecture
    if kind == "sd2":
        architecture += "-768-v" if predicts_v else "-512"
    metadata = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": KINDS[kind].implementation,
        "modelspec.title": title,
        "modelspec.resolution": f"{width << halvings}x{height << halvings}",
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
        _CONFIGS: json.dumps(stored),
    }
    tensor_file.write(path, content, dtype, metadata)


def _is_stored(entry: str) -> bool:
    """Returns whether an entry of a config holds for the file too, whose dtype and origin are others."""
    return entry not in ("dtype", "torch_dtype") and (entry[0] != "_" or entry == "_class_name")


def _stored(path: str, metadata: Mapping[str, str]) -> dict[str, Config]:
    """Returns the configs that `write` put into the metadata of a file; empty for the file of another tool."""
    try:
        stored = json.loads(metadata.get(_CONFIGS, "{}"))
    except ValueError as error:
        raise InputError("folder", f"{path} has metadata {_CONFIGS} that are no JSON: {error}") from None
    if not isinstance(stored, dict) or not all(isinstance(config, dict) for config in stored.values()):
        raise InputError("folder", f"{path} has metadata {_CONFIGS} that are not configs by the names of parts")
    return stored


def prediction_of(
    path: str, content: Tensors, unet: Tensors, metadata: Mapping[str, str], stored: Mapping[str, Config], kind: str
) -> str:
    """Returns what the U-Net predicts, `epsilon` or `v_prediction`.

    A tensor `v_pred` or the metadata determine it. In files of Stable Diffusion 2.x without either, `global_step` does,
    or else the weights.
    """
    name = "modelspec.prediction_type"
    said = {}
    if "v_pred" in content:
        said["its tensor v_pred"] = "v_prediction"
    if name in metadata:
        said[f"its metadata {name}"] = _PREDICTIONS.get(metadata[name], metadata[name])
    if "scheduler" in stored:
        said[f"its metadata {_CONFIGS}"] = stored["scheduler"].get("prediction_type", "epsilon")
    if len({*said.values()}) > 1:
        problem = " and ".join(f"{value} by {source}" for source, value in said.items())
        raise InputError("folder", f"{path} predicts {problem}; remove what is wrong")
    if said:
        return next(iter(said.values()))
    if "global_step" in content and content["global_step"].item() == _EPSILON_STEP:
        return "epsilon"
    return "v_prediction" if original_configs.predicts_v(unet, kind) else "epsilon"


def _without_prefix(content: Tensors, prefix: str) -> dict[str, np.ndarray]:
    """Returns the tensors whose names have a prefix, by their names without it."""
    return {name[len(prefix) :]: tensor for name, tensor in content.items() if name.startswith(prefix)}
