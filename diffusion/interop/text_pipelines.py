"""Pipelines of diffusers that draw images from texts: their parts, and the sections of a config that refer to these."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from diffusion.core import model_folder, single_file
from diffusion.core.types import InputError, Params, Spec
from diffusion.encoders import autoencoder_folder, pretrained_text, text_folder, tokenizers

# The classes of autoencoders, and their names here.
AUTOENCODERS = {"AutoencoderKL": "kl", "AutoencoderTiny": "tiny", "VQModel": "vq"}
# Entries of a scheduler that these pipelines replace, because early folders have other ones.
_STABLE_DIFFUSION = {"steps_offset": 1, "clip_sample": False}
_INPAINTING = {"steps_offset": 1, "skip_prk_steps": True}
FEW_STEPS = 4  # of models that were distilled for few steps
_ENCODERS = ("text_encoder", "text_encoder_2")
JOINED = {"text_encoder": "clip", "text_encoder_2": "clip_2"}  # names of parameters of `encoders.text.joined`


@dataclasses.dataclass(frozen=True)
class Class:
    """A class of pipelines.

    Attributes:
      text: The text encoders: `clip`; `sdxl`, two of CLIP, of which the refiner has the second alone; or `t5`.
      scale: The guidance scale that the class uses unless another one is given.
      length: The number of tokens of T5.
      scheduler: Entries of the scheduler that the class replaces.
    """

    text: Literal["clip", "sdxl", "t5"]
    scale: float
    length: int | None = None
    scheduler: Mapping[str, Any] = dataclasses.field(default_factory=dict)


CLASSES = {
    "StableDiffusionPipeline": Class("clip", 7.5, scheduler=_STABLE_DIFFUSION),
    "StableDiffusionImg2ImgPipeline": Class("clip", 7.5, scheduler=_STABLE_DIFFUSION),
    "StableDiffusionInpaintPipeline": Class("clip", 7.5, scheduler=_INPAINTING),
    "StableDiffusionInstructPix2PixPipeline": Class("clip", 7.5),
    "LatentConsistencyModelPipeline": Class("clip", 8.5),
    "StableDiffusionXLPipeline": Class("sdxl", 5.0),
    "StableDiffusionXLImg2ImgPipeline": Class("sdxl", 5.0),
    "StableDiffusionXLInpaintPipeline": Class("sdxl", 7.5),
    "StableDiffusionXLInstructPix2PixPipeline": Class("sdxl", 5.0),
    "PixArtAlphaPipeline": Class("t5", 4.5, length=120),
    "PixArtSigmaPipeline": Class("t5", 4.5, length=300),
}


def text_encoders(kind: str, index: Mapping[str, Any]) -> list[str]:
    """Returns the folders of the text encoders of a pipeline, given the content of its `model_index.json`."""
    if CLASSES[kind].text != "sdxl":
        return ["text_encoder"]
    return [name for name in _ENCODERS if name == "text_encoder_2" or index.get(name) != [None, None]]


def check_parts(path: str, kind: str, index: Mapping[str, Any], network: str) -> None:
    """Raises InputError if a part of a pipeline is missing.

    Args:
      path: The folder of the pipeline.
      kind: Its class.
      index: The content of `model_index.json`.
      network: The folder of the network in that of the pipeline.
    """
    encoders = text_encoders(kind, index)
    required = {name: ("config.json",) for name in (network, "vae", *encoders)}
    if not single_file.split(path):
        required |= {name.replace("text_encoder", "tokenizer"): pretrained_text.TOKENIZER_FILES for name in encoders}
    for name, files in (required | {"scheduler": ("scheduler_config.json",)}).items():
        if not set(files) & set(model_folder.names(os.path.join(path, name))):
            problem = f"{path} must contain {name}/{' or '.join(files)}, as a {kind} does"
            fix = "complete it" + ("" if name == network else f", or give {os.path.join(path, network)} alone")
            raise InputError("folder", f"{problem}; {fix}")


def variants(path: str, names: list[str], variant: str | None) -> dict[str, str | None]:
    """Returns which variant of the weights to read of each part: none for parts that lack it, if others have it."""
    has = {name: model_folder.has_variant(os.path.join(path, name), variant, _weights(name)) for name in names}
    return {name: variant if has[name] or not any(has.values()) else None for name in names}


def _weights(name: str) -> str:
    return model_folder.TRANSFORMERS_WEIGHTS if name in _ENCODERS else model_folder.WEIGHTS


def encoder_sections(
    path: str, kind: str, index: Mapping[str, Any], chosen: Mapping[str, str | None]
) -> dict[str, dict[str, Any]]:
    """Returns the sections `autoencoder` and `text_encoder` of a config, which refer to the folder of a pipeline.

    Args:
      path, kind, index: See `check_parts`.
      chosen: As `variants` returns it.
    """

    def with_variant(section: dict[str, Any], *names: str) -> dict[str, Any]:
        found = next((chosen[name] for name in names if chosen[name]), None)
        return {**section, "variant": found} if found else section

    vae, about = os.path.join(path, "vae"), CLASSES[kind]
    # A class that is not known is refused where the autoencoder is built.
    name = AUTOENCODERS.get(model_folder.read_json(vae, "config.json").get("_class_name"), "kl")
    names, text = text_encoders(kind, index), {"name": "clip", "path": path}
    if about.text == "t5":
        text = {"name": "t5", "path": path, "length": about.length, "use_mask": True}
    elif about.text == "sdxl":
        text = {"name": "joined", "path": path, "layout": "sdxl"}
        if len(names) == 1:
            text = {"name": "clip", "path": path, "part": names[0], "hidden_state": "penultimate",
                    "pooled": "projected"}  # fmt: skip
        text["null"] = "zeros" if index.get("force_zeros_for_empty_prompt", True) else "empty"
    return {
        "autoencoder": with_variant({"name": name, "path": vae}, "vae"),
        "text_encoder": with_variant(text, *names),
    }


def sampling_sections(kind: str, network: Mapping[str, Any], sections: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the sections `sampler` and `guidance` of a config, with the guidance of a class of pipelines.

    A network that reads the guidance scale is not guided otherwise. A scheduler of consistency models, or one of Euler
    that ends a `trailing` grid of a model that predicts noise (Turbo, Lightning), says that the model was distilled
    for few steps, without guidance.

    Args:
      kind: The class.
      network: The section `network`.
      sections: As `schedulers.read` returns them.
    """
    sampler, guidance = sections["sampler"], {**sections["guidance"], "scale": CLASSES[kind].scale}
    is_trailing = sampler["grid"]["name"] == "trailing" and sampler["name"].startswith("euler")
    predicts_noise = sections["objective"]["parameterization"]["name"] == "eps"
    if network.get("scalar_conditions"):
        guidance["name"] = "guidance_embedding"
    elif is_trailing and predicts_noise:
        sampler, guidance = {**sampler, "steps": FEW_STEPS}, {**guidance, "scale": 1.0}
    elif sections["objective"]["name"] == "consistency":
        guidance["scale"] = 1.0
    return {"sampler": sampler, "guidance": guidance}


def class_of(network: Mapping[str, Any], spec: Spec, sections: Mapping[str, Any]) -> str | None:
    """Returns the class of pipelines for a network and its encoders; None if diffusers has none.

    Args:
      network: The section `network`.
      spec: What the network models.
      sections: The sections `autoencoder`, `text_encoder` and `objective` of a config.
    """
    autoencoder, text = sections.get("autoencoder") or {}, sections.get("text_encoder") or {}
    if autoencoder.get("name") not in AUTOENCODERS.values() or text.get("name") not in ("clip", "joined", "t5"):
        return None
    if network["name"] == "dit":
        is_long = spec.conditions["text"].shape[0] > CLASSES["PixArtAlphaPipeline"].length
        return None if text["name"] != "t5" else "PixArtSigmaPipeline" if is_long else "PixArtAlphaPipeline"
    if text["name"] == "t5" or text.get("layout", "sdxl") != "sdxl":
        return None
    channels = sum(condition.shape[-1] for condition in spec.conditions.values() if condition.kind == "image")
    task = {0: "", spec.shape[-1]: "InstructPix2Pix", spec.shape[-1] + 1: "Inpaint"}.get(channels)
    if task is None:
        return None
    if text["name"] == "joined":
        return f"StableDiffusionXL{task}Pipeline"
    if "time_ids" in spec.conditions:
        return None if task else "StableDiffusionXLImg2ImgPipeline"
    if network.get("scalar_conditions") and sections["objective"]["name"] == "consistency" and not task:
        return "LatentConsistencyModelPipeline"
    return f"StableDiffusion{task}Pipeline"


def write_parts(
    path: str, kind: str, sections: Mapping[str, Any], text_params: Params | None = None
) -> dict[str, Any]:  # fmt: skip
    """Writes the autoencoder, the text encoders and the tokenizers that a config refers to into a pipeline's folder.

    The autoencoder stays as it is. Text encoders and tokenizers have the layouts that transformers 4 and 5 read.

    Args:
      path: The folder of the pipeline.
      kind: Its class.
      sections: The sections `autoencoder` and `text_encoder` of a config.
      text_params: The parameters of text encoders that were trained, in place of those in the folder.

    Returns:
      The entries of `model_index.json` for these parts, and the options of the class.

    Raises:
      InputError: A folder cannot be read.
    """
    autoencoder, text = sections["autoencoder"], sections["text_encoder"]
    vae = autoencoder_folder.model_of(autoencoder["path"])
    config = model_folder.read_json(vae, "config.json")
    model_folder.write(os.path.join(path, "vae"), config, model_folder.open_tensors(vae, autoencoder.get("variant")))
    index: dict[str, Any] = {"vae": ["diffusers", config["_class_name"]]}
    is_refiner = kind == "StableDiffusionXLImg2ImgPipeline"
    names = _ENCODERS if text["name"] == "joined" else (_ENCODERS[is_refiner],)
    for name in names:
        part = name if text["name"] == "joined" else text.get("part")
        kinds = (text_folder.T5,) if text["name"] == "t5" else (text_folder.CLIP, text_folder.PROJECTED)
        found = pretrained_text.find(text["path"], kinds, part, text.get("tokenizer"), weights=True)
        variant = text.get("variant")
        if not model_folder.has_variant(found.model, variant, model_folder.TRANSFORMERS_WEIGHTS):
            variant = None
        stored, tokenizer = text_folder.read(found.model, variant), name.replace("text_encoder", "tokenizer")
        stored = with_params(stored, text_params, text, name)
        text_folder.write(os.path.join(path, name), stored)
        tokenizers.write(pretrained_text.tokenizer_of(found), os.path.join(path, tokenizer))
        is_sentencepiece = os.path.isfile(os.path.join(path, tokenizer, "spiece.model"))
        t5 = "T5Tokenizer" if is_sentencepiece else "T5TokenizerFast"
        index[name] = ["transformers", stored.kind]
        index[tokenizer] = ["transformers", t5 if stored.kind == text_folder.T5 else "CLIPTokenizer"]
    if CLASSES[kind].text == "clip":
        index |= {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
    if CLASSES[kind].text == "sdxl":
        index["force_zeros_for_empty_prompt"] = _forces_zeros(text)
    if is_refiner:
        index |= {"text_encoder": [None, None], "tokenizer": [None, None], "requires_aesthetics_score": True}
    return index


def with_params(
    stored: text_folder.Stored, params: Params | None, section: Mapping[str, Any], name: str
) -> text_folder.Stored:
    """Returns a text encoder with trained parameters in place of those in its folder, if there are any.

    Args:
      stored: The encoder.
      params: The parameters that were trained, or None.
      section: The section `text_encoder` of a config.
      name: The folder of the encoder in that of the pipeline.
    """
    if params is None:
        return stored
    return dataclasses.replace(stored, params=params[JOINED[name]] if section["name"] == "joined" else params)


def _forces_zeros(section: Mapping[str, Any]) -> bool:
    """Returns whether zeros stand for a dropped text of SDXL."""
    null = section.get("null", "auto")
    return null == "zeros" or (null == "auto" and pretrained_text.forces_zeros(section["path"]))
