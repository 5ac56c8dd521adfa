"""Reads and writes pipelines of diffusers: a model folder, `scheduler/scheduler_config.json`, and `model_index.json`,
which names both."""

import os
from collections.abc import Mapping
from typing import Any

from diffusion.core import model_folder
from diffusion.core.types import InputError
from diffusion.interop import diffusers_models, schedulers
from diffusion.interop.diffusers_models import Model

# For each network, its component, its class, and a pipeline that contains no text encoder, if there is one.
COMPONENTS = {
    "unet": ("unet", "UNet2DModel", "DDPMPipeline"),
    "unet_text": ("unet", "UNet2DConditionModel", None),
    "dit": ("transformer", "DiTTransformer2DModel", "DiTPipeline"),
}
_SCHEDULER = "scheduler_config.json"
# Schedulers that have a pipeline of their own for a UNet2DModel; with the others it is a DDPMPipeline.
PIPELINES = {"DDIMScheduler": "DDIMPipeline", "CMStochasticIterativeScheduler": "ConsistencyModelPipeline"}
TEXT_LENGTHS = {"PixArtSigmaPipeline": 300}  # tokens, where it is not the default of the model's class
# Schedulers whose noise must be scaled, which no pipeline of these models does, and those that take no generator, which
# DDPMPipeline passes.
SCALED = ("Euler", "EDM", "Heun", "KDPM2", "LMS")
NO_GENERATOR = ("PNDM", "UniPC", "DEIS")


def read(path: str, *, null_class: bool = False, variant: str | None = None) -> tuple[Model, dict[str, Any] | None]:
    """Reads a model folder or a pipeline folder.

    The first pipelines on the hub have all files in one folder, without subfolders for the model and the scheduler.

    Args:
      path: The folder.
      null_class: Whether the last row of a U-Net's table of classes is the null class.
      variant: The variant of the weights; see `model_folder.read_tensors`.

    Returns:
      The model, and the sections `objective`, `sampler` and `guidance` of a config that correspond to the scheduler;
      None if there is no scheduler.

    Raises:
      InputError: if the folder cannot be read or what it contains is not supported.
    """
    folder, kind = _model_folder(path)
    length = TEXT_LENGTHS.get(kind)
    model = diffusers_models.read(folder, null_class=null_class, variant=variant, text_length=length)
    for place in (os.path.join(path, "scheduler"), path):
        if os.path.exists(os.path.join(place, _SCHEDULER)):
            return model, schedulers.read(model_folder.read_json(place, _SCHEDULER), model.network["outputs"])
    if folder != path:
        raise InputError("folder", f"{path} must contain scheduler/{_SCHEDULER}")
    return model, None


def _model_folder(path: str) -> tuple[str, str | None]:
    """Returns the folder of the model of a pipeline, which may be the pipeline's own, and the pipeline's class."""
    if not os.path.exists(os.path.join(path, "model_index.json")):
        return path, None
    index = model_folder.read_json(path, "model_index.json")
    for component in (component for component, _, _ in COMPONENTS.values() if component in index):
        inner = os.path.join(path, component)
        has_inner = os.path.isdir(inner) or not os.path.exists(os.path.join(path, "config.json"))
        return inner if has_inner else path, index.get("_class_name")
    raise InputError("folder", f"{path} must contain a pipeline with a unet or a transformer")


def write(path: str, model: Model, sections: Mapping[str, Any]) -> str:
    """Writes a pipeline folder, or only a model folder if the objective has no scheduler in diffusers.

    Args:
      path: The folder.
      model: The model to write.
      sections: The section `objective` of a config, and optionally `sampler` and `guidance`.

    Returns:
      A description of what was written.

    Raises:
      InputError: naming the option that diffusers' model does not support.
    """
    name = model.network["name"]
    component, kind, pipeline = COMPONENTS.get(name, ("", "", ""))
    problem = schedulers.problem(sections["objective"])
    if any(condition.kind == "text" for condition in model.spec.conditions.values()):
        problem = "it would have to contain the text encoder"
    if problem:
        kind = diffusers_models.write(path, model)
        return f"{kind}; no pipeline, because {problem}"
    diffusers_models.write(os.path.join(path, component), model)
    outputs = diffusers_models.with_defaults(model.network)["outputs"]
    config, exact = schedulers.write(sections, outputs, splits=name == "dit")
    model_folder.write_json(os.path.join(path, "scheduler"), _SCHEDULER, config)
    scheduler = config["_class_name"]
    pipeline = PIPELINES.get(scheduler, pipeline) if name == "unet" else pipeline
    parts = {component: ["diffusers", kind], "scheduler": ["diffusers", scheduler]}
    if name == "dit":
        parts["vae"] = ["diffusers", "AutoencoderKL"]
    about = {"_class_name": pipeline, "_diffusers_version": model_folder.VERSION}
    model_folder.write_json(path, "model_index.json", about | parts)
    notes = [f"{pipeline} with {scheduler}"]
    if not exact:
        notes.append(f"as diffusers has none for the sampler {sections['sampler']['name']!r} with its options")
    if scheduler.startswith(SCALED if name == "dit" else SCALED + NO_GENERATOR):
        notes.append("which cannot call it as it needs: call model and scheduler in a loop")
    if name == "dit":
        notes.append("which requires a vae: from_pretrained(..., vae=vae)")
    return ", ".join(notes)
