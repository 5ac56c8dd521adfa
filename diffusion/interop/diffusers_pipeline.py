"""Reads and writes pipelines of diffusers: a model folder, `scheduler/scheduler_config.json`, and `model_index.json`,
which names both. Pipelines that read a text have further parts; see `text_pipelines`."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion.core import model_folder
from diffusion.core.types import InputError
from diffusion.interop import diffusers_models, schedulers, text_pipelines
from diffusion.interop.diffusers_models import Model, Place, Weights

# For each network, its component, and a pipeline without a text encoder, if there is one.
COMPONENTS = {
    "unet": ("unet", "DDPMPipeline"),
    "unet_text": ("unet", None),
    "dit": ("transformer", "DiTPipeline"),
}
_SCHEDULER = "scheduler_config.json"
# Schedulers that have a pipeline of their own for a UNet2DModel; with the others it is a DDPMPipeline.
PIPELINES = {"DDIMScheduler": "DDIMPipeline", "CMStochasticIterativeScheduler": "ConsistencyModelPipeline"}
# Schedulers whose noise must be scaled, which no pipeline of these models does, and those that take no generator, which
# DDPMPipeline passes.
SCALED = ("Euler", "EDM", "Heun", "KDPM2", "LMS")
NO_GENERATOR = ("PNDM", "UniPC", "DEIS")


class Pipeline(NamedTuple):
    """What a folder contains.

    Attributes:
      model: The network.
      sections: The sections `objective`, `sampler` and `guidance` of a config that correspond to the scheduler, and of
        a pipeline that reads a text also `autoencoder` and `text_encoder`; None if there is no scheduler.
      kind: The class of the pipeline; None for the folder of a model.
      scheduler: The class of the scheduler, or None.
    """

    model: Model
    sections: dict[str, Any] | None
    kind: str | None = None
    scheduler: str | None = None


def read(
    path: str, *, null_class: bool = False, variant: str | None = None, weights: Weights = "read",
    place: Place | None = None,
) -> Pipeline:  # fmt: skip
    """Reads a model folder or a pipeline folder.

    The first pipelines on the hub have all files in one folder, without subfolders for the model and the scheduler. The
    autoencoder and the text encoders of a pipeline are not read; the sections refer to them.

    Args:
      path: The folder, or a single file of Stable Diffusion.
      null_class: Whether the last row of a U-Net's table of classes is the null class.
      variant: The variant of the weights; see `model_folder.read_tensors`. Parts of a pipeline that lack it are read
        without one, if another part has it.
      weights, place: Whether to read the parameters, and what to do with them; see `diffusers_models.read`.

    Raises:
      InputError: if the folder cannot be read, a part is missing, or what it contains is not supported.
    """
    reading = {"weights": weights, "place": place}
    if "model_index.json" not in model_folder.names(path):
        model = diffusers_models.read(path, null_class=null_class, variant=variant, **reading)
        if not os.path.exists(os.path.join(path, _SCHEDULER)):
            return Pipeline(model, None)
        scheduler = model_folder.read_json(path, _SCHEDULER)
        return Pipeline(model, schedulers.read(scheduler, model.network["outputs"]), None, scheduler.get("_class_name"))
    index = model_folder.read_json(path, "model_index.json")
    kind, component = index.get("_class_name"), _component(path, index)
    folder = os.path.join(path, component)
    if kind in text_pipelines.CLASSES:
        return _read_text_pipeline(path, kind, index, component, variant, **reading)
    if not os.path.isdir(folder) and os.path.exists(os.path.join(path, "config.json")):
        folder = path
    model = diffusers_models.read(folder, null_class=null_class, variant=variant, **reading)
    if any(condition.kind == "text" for condition in model.spec.conditions.values()):
        known, alone = ", ".join(text_pipelines.CLASSES), f"the folder of the network alone can be read: {folder}"
        raise InputError("model_index.json._class_name", f"must be among {known} to be read, got {kind}; {alone}")
    places = [place for place in (os.path.join(path, "scheduler"), path)
              if os.path.exists(os.path.join(place, _SCHEDULER))]  # fmt: skip
    if places:
        scheduler = model_folder.read_json(places[0], _SCHEDULER)
        return Pipeline(model, schedulers.read(scheduler, model.network["outputs"]), kind, scheduler.get("_class_name"))
    if folder != path:
        raise InputError("folder", f"{path} must contain scheduler/{_SCHEDULER}")
    return Pipeline(model, None, kind)


def _component(path: str, index: Mapping[str, Any]) -> str:
    """Returns the name of the network among the components of a pipeline."""
    for component, _ in COMPONENTS.values():
        if component in index:
            return component
    raise InputError("folder", f"{path} must contain a pipeline with a unet or a transformer")


def _read_text_pipeline(
    path: str, kind: str, index: Mapping[str, Any], component: str, variant: str | None, **reading: Any
) -> Pipeline:
    text_pipelines.check_parts(path, kind, index, component)
    names = [component, "vae", *text_pipelines.text_encoders(kind, index)]
    chosen = text_pipelines.variants(path, names, variant)
    about = text_pipelines.CLASSES[kind]
    model = diffusers_models.read(
        os.path.join(path, component), variant=chosen[component], text_length=about.length, **reading
    )
    scheduler = {**model_folder.read_json(os.path.join(path, "scheduler"), _SCHEDULER), **about.scheduler}
    sections = schedulers.read(scheduler, model.network["outputs"])
    sections |= text_pipelines.sampling_sections(kind, model.network, sections)
    sections |= text_pipelines.encoder_sections(path, kind, index, chosen)
    return Pipeline(model, sections, kind, scheduler.get("_class_name"))


def write(path: str, model: Model, sections: Mapping[str, Any]) -> str:
    """Writes a pipeline folder, or only a model folder if diffusers has no pipeline for the objective or the encoders.

    Args:
      path: The folder.
      model: The model to write.
      sections: The section `objective` of a config, and optionally `sampler`, `guidance`, `autoencoder` and
        `text_encoder`.

    Returns:
      A description of what was written.

    Raises:
      InputError: naming the option that diffusers' model does not support, or an encoder cannot be read.
    """
    name = model.network["name"]
    component, pipeline = COMPONENTS.get(name, ("", ""))
    problem = schedulers.problem(sections["objective"])
    has_text = any(condition.kind == "text" for condition in model.spec.conditions.values())
    if has_text:
        pipeline = text_pipelines.class_of(model.network, model.spec, sections)
        problem = problem or ("" if pipeline else "diffusers has none with its autoencoder and text encoder")
    if problem:
        kind = diffusers_models.write(path, model)
        return f"{kind}; no pipeline, because {problem}"
    kind = diffusers_models.write(os.path.join(path, component), model)
    outputs = diffusers_models.with_defaults(model.network)["outputs"]
    config, exact = schedulers.write(sections, outputs, splits=name == "dit")
    model_folder.write_json(os.path.join(path, "scheduler"), _SCHEDULER, config)
    scheduler = config["_class_name"]
    pipeline = PIPELINES.get(scheduler, pipeline) if name == "unet" else pipeline
    parts: dict[str, Any] = {component: ["diffusers", kind], "scheduler": ["diffusers", scheduler]}
    if has_text:
        parts |= text_pipelines.write_parts(path, pipeline, sections, model.text_encoder)
    elif name == "dit":
        parts["vae"] = ["diffusers", "AutoencoderKL"]
    about = {"_class_name": pipeline, "_diffusers_version": model_folder.VERSION}
    model_folder.write_json(path, "model_index.json", about | parts)
    notes = [f"{pipeline} with {scheduler}"]
    if not exact:
        notes.append(f"as diffusers has none for the sampler {sections['sampler']['name']!r} with its options")
    if not has_text and scheduler.startswith(SCALED if name == "dit" else SCALED + NO_GENERATOR):
        notes.append("which cannot call it as it needs: call model and scheduler in a loop")
    if not has_text and name == "dit":
        notes.append("which requires a vae: from_pretrained(..., vae=vae)")
    return ", ".join(notes)
