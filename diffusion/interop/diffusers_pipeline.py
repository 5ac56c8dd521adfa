"""Reads and writes pipelines of diffusers: a model folder, `scheduler/scheduler_config.json`, and `model_index.json`,
which names both."""

import os
from collections.abc import Mapping
from typing import Any

from diffusion.core import model_folder
from diffusion.core.types import InputError
from diffusion.interop import diffusers_models
from diffusion.interop.config_json import VERSION
from diffusion.interop.diffusers_models import Model

COMPONENTS = {
    "unet": ("unet", "UNet2DModel", "DDPMPipeline"),
    "dit": ("transformer", "DiTTransformer2DModel", "DiTPipeline"),
}
_SCHEDULER = "scheduler_config.json"
# DiTPipeline does not pass a learned variance to its scheduler, so a DiT is sampled with DDIM.
SCHEDULERS = {"unet": "DDPMScheduler", "dit": "DDIMScheduler"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


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
    folder = _model_folder(path)
    model = diffusers_models.read(folder, null_class=null_class, variant=variant)
    for place in (os.path.join(path, "scheduler"), path):
        if os.path.exists(os.path.join(place, _SCHEDULER)):
            return model, sections(model_folder.read_json(place, _SCHEDULER), model.network["outputs"])
    if folder != path:
        raise InputError("folder", f"{path} must contain scheduler/{_SCHEDULER}")
    return model, None


def _model_folder(path: str) -> str:
    """Returns the folder of the model of a pipeline, which may be the pipeline's own."""
    if not os.path.exists(os.path.join(path, "model_index.json")):
        return path
    index = model_folder.read_json(path, "model_index.json")
    for component in (component for component, _, _ in COMPONENTS.values() if component in index):
        inner = os.path.join(path, component)
        return inner if os.path.isdir(inner) or not os.path.exists(os.path.join(path, "config.json")) else path
    raise InputError("folder", f"{path} must contain a pipeline of a UNet2DModel or a DiTTransformer2DModel")


def write(path: str, model: Model, objective: Mapping[str, Any]) -> str:
    """Writes a pipeline folder, or only a model folder if the objective has no scheduler in diffusers.

    Args:
      path: The folder.
      model: The model to write.
      objective: The section `objective` of a config.

    Returns:
      A description of what was written.

    Raises:
      InputError: naming the option that diffusers' model does not support.
    """
    name = model.network["name"]
    component, kind, pipeline = COMPONENTS.get(name, ("", "", ""))
    problem = _no_scheduler(objective)
    if problem:
        diffusers_models.write(path, model)
        return f"{kind}; no pipeline, because {problem}"
    diffusers_models.write(os.path.join(path, component), model)
    scheduler = SCHEDULERS[name]
    config = {"_class_name": scheduler, "_diffusers_version": VERSION, **_scheduler(objective)}
    if name == "unet":
        config["variance_type"] = "learned_range" if objective.get("learned_variance") else "fixed_small"
    model_folder.write_json(os.path.join(path, "scheduler"), "scheduler_config.json", config)
    parts = {component: ["diffusers", kind], "scheduler": ["diffusers", scheduler]}
    if name == "dit":
        parts["vae"] = ["diffusers", "AutoencoderKL"]
    model_folder.write_json(path, "model_index.json", {"_class_name": pipeline, "_diffusers_version": VERSION, **parts})
    return pipeline + (", which requires a vae: from_pretrained(..., vae=vae)" if name == "dit" else "")


def _no_scheduler(objective: Mapping[str, Any]) -> str:
    """Describes why diffusers' DDPMScheduler cannot sample the objective's models; empty if it can."""
    schedule, parameterization = (_named(objective.get(name)) for name in ("schedule", "parameterization"))
    if objective["name"] != "denoising" or schedule.get("name", "vp") != "vp":
        return "the objective is not denoising with schedule vp"
    if schedule.get("betas", "linear") not in BETAS:
        return f"diffusers does not support betas {schedule['betas']!r}"
    if parameterization.get("name", "eps") not in PREDICTIONS:
        return f"diffusers does not support parameterization {parameterization['name']!r}"
    if parameterization.get("c_noise", "time") != "index":
        return "the network was not trained on table indices (objective.parameterization.c_noise = 'index')"
    return ""


def _scheduler(objective: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the scheduler's configuration."""
    schedule, parameterization = (_named(objective.get(name)) for name in ("schedule", "parameterization"))
    betas = schedule.get("betas", "linear")
    start, end = (0.00085, 0.012) if betas == "scaled_linear" else (1e-4, 0.02)
    return {
        "num_train_timesteps": schedule.get("num_steps", 1000),
        "beta_schedule": BETAS[betas],
        "beta_start": schedule.get("beta_start") or start,
        "beta_end": schedule.get("beta_end") or end,
        "rescale_betas_zero_snr": schedule.get("zero_terminal_snr", False),
        "trained_betas": schedule.get("trained_betas"),
        "prediction_type": PREDICTIONS[parameterization.get("name", "eps")],
        "clip_sample": False,
        "timestep_spacing": "leading",
    }


def sections(scheduler: Mapping[str, Any], outputs: int) -> dict[str, Any]:
    """Returns the sections `objective`, `sampler` and `guidance` that correspond to a scheduler's configuration.

    Args:
      scheduler: The content of `scheduler_config.json`.
      outputs: The network's number of output values per channel.

    Raises:
      InputError: naming the entry that is not supported.
    """
    betas = {foreign: native for native, foreign in BETAS.items()}
    predictions = {foreign: native for native, foreign in PREDICTIONS.items()}
    named = {"beta_schedule": "linear", "prediction_type": "epsilon", **scheduler}
    for field, known in (("beta_schedule", betas), ("prediction_type", predictions)):
        if named[field] not in known:
            raise InputError(
                f"scheduler_config.json.{field}", f"must be among {', '.join(known)} to be read, got {named[field]!r}"
            )
    if scheduler.get("trained_betas") is not None:
        raise InputError(
            "scheduler_config.json.trained_betas", "must be None to be read; only beta_schedule is supported"
        )
    schedule = {
        "name": "vp",
        "betas": betas[named["beta_schedule"]],
        "num_steps": scheduler.get("num_train_timesteps", 1000),
        "zero_terminal_snr": scheduler.get("rescale_betas_zero_snr", False),
    }
    if schedule["betas"] != "cosine":
        schedule |= {"beta_start": scheduler.get("beta_start", 1e-4), "beta_end": scheduler.get("beta_end", 0.02)}
    learned = outputs == 2
    variance = "learned" if learned else {"fixed_large": "beta"}.get(scheduler.get("variance_type"), "beta_tilde")
    sampler = {"name": "ancestral", "variance": variance, "steps": 250}
    if scheduler.get("_class_name") == "DDIMScheduler":
        sampler = {"name": "ddim", "eta": 0.0, "steps": 50}
    guidance = {"name": "cfg", "scale": 1.0}
    if scheduler.get("clip_sample", True):
        guidance["threshold"] = {"percentile": 1.0, "limit": float(scheduler.get("clip_sample_range", 1.0))}
    return {
        "objective": {
            "name": "denoising",
            "schedule": schedule,
            "parameterization": {"name": predictions[named["prediction_type"]], "c_noise": "index"},
            "time_sampler": {"name": "discrete"},
            "weighting": {"name": "simple"},
            "learned_variance": learned,
        },
        "sampler": {**sampler, "grid": {"name": "leading"}},
        "guidance": guidance,
    }


def _named(part: Any) -> dict[str, Any]:
    """Returns a part of a config as a dict with the key `name`; empty if it is None."""
    return {"name": part} if isinstance(part, str) else dict(part or {})
