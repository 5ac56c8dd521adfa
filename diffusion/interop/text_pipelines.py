"""Pipelines of diffusers that draw images from texts: their parts, and the sections of a config that refer to these."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal

from diffusion.core import model_folder
from diffusion.core.types import InputError

# The classes of autoencoders, and their names here.
AUTOENCODERS = {"AutoencoderKL": "kl", "AutoencoderTiny": "tiny", "VQModel": "vq"}
# Entries of a scheduler that these pipelines replace, because early folders have other ones.
_STABLE_DIFFUSION = {"steps_offset": 1, "clip_sample": False}
_INPAINTING = {"steps_offset": 1, "skip_prk_steps": True}
FEW_STEPS = 4  # of models that were distilled for few steps
_ENCODERS = ("text_encoder", "text_encoder_2")


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
    for name in (network, "vae", *text_encoders(kind, index), "scheduler"):
        file = os.path.join(name, "scheduler_config.json" if name == "scheduler" else "config.json")
        if not os.path.isfile(os.path.join(path, file)):
            problem = f"{path} must contain {file}, as a {kind} does"
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
