"""Writes a model of `networks.unet_text` with its encoders as a single file in the original layout of Stable Diffusion,
for ComfyUI and other tools, and for `from_single_file` of diffusers."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from diffusion.core import model_folder, single_file, tensors
from diffusion.core.types import InputError
from diffusion.encoders import autoencoder_folder, pretrained_text, text_folder
from diffusion.encoders.text_folder import CLIP, PROJECTED
from diffusion.interop import diffusers_models, diffusers_unet_text, schedulers, text_pipelines
from diffusion.interop.diffusers_models import Model

Dtype = Literal["float16", "bfloat16", "float32"]
PREDICTIONS = ("epsilon", "v_prediction")  # that tools know in such a file


def write(path: str, model: Model, sections: Mapping[str, Any], *, dtype: Dtype, title: str) -> str:
    """Writes a file.

    The encoders are copied from the folders or the file that the config refers to, but for a text encoder that was
    trained.

    Args:
      path: The file.
      model: The network. Its data are those that the network reads.
      sections: The sections `objective`, `sampler`, `guidance`, `autoencoder` and `text_encoder` of a config.
      dtype: The dtype of all tensors.
      title: The name of the model in the metadata.

    Returns:
      A description of what was written.

    Raises:
      InputError: The layout does not have such a model, an encoder cannot be read, or a number does not fit the dtype.
    """
    if model.network["name"] != "unet_text":
        problem = f"must be unet_text to be written as a single file, got {model.network['name']!r}; write a folder"
        raise InputError("network.name", problem)
    network = diffusers_models.with_defaults(model.network)
    if problem := schedulers.problem(sections["objective"]):
        raise InputError("objective", f"cannot be written as a single file: {problem}")
    scheduler, exact = schedulers.write(sections, network["outputs"], splits=False)
    if scheduler.get("prediction_type") not in PREDICTIONS:
        problem = f"must be eps or v to be written as a single file, got {sections['objective']['parameterization']}"
        raise InputError("objective.parameterization", problem)
    encoders = _encoders(model, sections)
    configs = {"unet": diffusers_unet_text.config_of(network, model.spec, model.params), "scheduler": scheduler}
    found = {"unet": tensors.to_foreign(diffusers_models.pairs(model.network, model.spec), model.params)}
    for name, (folder, variant) in encoders.items():
        weights = model_folder.WEIGHTS if name == "vae" else model_folder.TRANSFORMERS_WEIGHTS
        variant = variant if model_folder.has_variant(folder, variant, weights) else None
        configs[name] = model_folder.read_json(folder, "config.json")
        if name == "vae" or model.text_encoder is None:
            found[name] = model_folder.open_tensors(folder, variant, weights)
        else:
            stored = text_folder.read(folder, variant, weights=False)
            stored = text_pipelines.with_params(stored, model.text_encoder, sections["text_encoder"], name)
            found[name] = text_folder.foreign_of(stored)
    null = sections["text_encoder"].get("null")
    if sections["text_encoder"]["name"] == "joined" and null in ("zeros", "empty"):
        configs[single_file.INDEX] = {"force_zeros_for_empty_prompt": null == "zeros"}
    single_file.write(path, configs, found, dtype, title)
    sampler = f"{scheduler['_class_name']}{'' if exact else ', as diffusers has none for the sampler'}"
    return f"{', '.join(found)} in {dtype}; {scheduler['prediction_type']}, {sampler}"


def _encoders(model: Model, sections: Mapping[str, Any]) -> dict[str, tuple[str, str | None]]:
    """Returns the folder and the variant of each encoder, by its name in a pipeline.

    Raises:
      InputError: There is none, or it is of a kind that the layout does not have.
    """
    autoencoder, text = sections.get("autoencoder"), sections.get("text_encoder")
    if not autoencoder or autoencoder["name"] != "kl":
        raise InputError("autoencoder", "must be kl to be written as a single file, which contains it")
    vae = autoencoder_folder.model_of(os.path.expanduser(autoencoder["path"]))
    found = {"vae": (vae, autoencoder.get("variant"))}
    if not text or text["name"] not in ("clip", "joined") or text.get("layout", "sdxl") != "sdxl":
        problem = "must be clip, or joined with the layout sdxl, to be written as a single file, which contains it"
        raise InputError("text_encoder", problem)
    path, variant = os.path.expanduser(text["path"]), text.get("variant")
    if text["name"] == "joined":
        return found | {name: (os.path.join(path, name), variant) for name in ("text_encoder", "text_encoder_2")}
    folder = pretrained_text.find(path, (CLIP, PROJECTED), text.get("part"), weights=False).model
    name = "text_encoder_2" if diffusers_unet_text.TIME_IDS in model.spec.conditions else "text_encoder"
    return found | {name: (folder, variant)}
