"""Pipelines of diffusers: a model's folder, `scheduler/scheduler_config.json`, and `model_index.json` that names
both."""

import os
from collections.abc import Mapping
from typing import Any

from diffusion.core.types import InputError
from diffusion.interop import diffusers_models, model_folder
from diffusion.interop.diffusers_models import VERSION, Model

COMPONENTS = {
    "unet": ("unet", "UNet2DModel", "DDPMPipeline"),
    "dit": ("transformer", "DiTTransformer2DModel", "DiTPipeline"),
}
# A DiT's pipeline hands its scheduler no variance, so it takes DDIM's.
SCHEDULERS = {"unet": "DDPMScheduler", "dit": "DDIMScheduler"}
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def read(path: str, *, null_class: bool = False) -> tuple[Model, dict[str, Any] | None]:
    """Reads a model's folder, or a pipeline's.

    Returns:
      The model, and the sections `objective`, `sampler` and `guidance` that its noise schedule makes: None without one.

    Raises:
      InputError: it cannot be read.
    """
    if not os.path.exists(os.path.join(path, "model_index.json")):
        return diffusers_models.read(path, null_class=null_class), None
    index = model_folder.read_json(path, "model_index.json")
    for component, _, _ in COMPONENTS.values():
        if component in index:
            model = diffusers_models.read(os.path.join(path, component), null_class=null_class)
            schedule = model_folder.read_json(os.path.join(path, "scheduler"), "scheduler_config.json")
            return model, _sections(schedule, model.network["outputs"])
    raise InputError("folder", f"{path} is no pipeline of a UNet2DModel or a DiTTransformer2DModel")


def write(path: str, model: Model, objective: Mapping[str, Any]) -> str:
    """Writes a pipeline's folder, or the model's alone where the objective has no scheduler in diffusers.

    Returns:
      What was written, in words.
    """
    name = model.network["name"]
    component, kind, pipeline = COMPONENTS.get(name, ("", "", ""))
    problem = _no_scheduler(objective)
    if problem:
        diffusers_models.write(path, model)
        return f"{kind}; no pipeline, for {problem}"
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
    return pipeline + (", which wants its vae: from_pretrained(..., vae=vae)" if name == "dit" else "")


def _no_scheduler(objective: Mapping[str, Any]) -> str:
    """Why the objective's models cannot be sampled by diffusers' DDPMScheduler; empty if they can."""
    schedule, parameterization = (_named(objective.get(name)) for name in ("schedule", "parameterization"))
    if objective["name"] != "ddpm" or schedule.get("name", "vp") != "vp":
        return "its objective is not ddpm on a vp schedule"
    if schedule.get("betas", "linear") not in BETAS:
        return f"diffusers reads no betas {schedule['betas']!r}"
    if parameterization.get("name", "eps") not in PREDICTIONS:
        return f"diffusers knows no parameterization {parameterization['name']!r}"
    if parameterization.get("c_noise", "time") != "index":
        return "the network was trained on times, not on indices (objective.parameterization.c_noise = 'index')"
    return ""


def _scheduler(objective: Mapping[str, Any]) -> dict[str, Any]:
    schedule, parameterization = (_named(objective.get(name)) for name in ("schedule", "parameterization"))
    betas = schedule.get("betas", "linear")
    start, end = (0.00085, 0.012) if betas == "scaled_linear" else (1e-4, 0.02)
    return {
        "num_train_timesteps": schedule.get("num_steps", 1000),
        "beta_schedule": BETAS[betas],
        "beta_start": schedule.get("beta_start") or start,
        "beta_end": schedule.get("beta_end") or end,
        "rescale_betas_zero_snr": schedule.get("zero_terminal_snr", False),
        "prediction_type": PREDICTIONS[parameterization.get("name", "eps")],
        "clip_sample": False,
        "timestep_spacing": "leading",
    }


def _sections(scheduler: Mapping[str, Any], outputs: int) -> dict[str, Any]:
    betas = {theirs: ours for ours, theirs in BETAS.items()}
    predictions = {theirs: ours for ours, theirs in PREDICTIONS.items()}
    named = {"beta_schedule": "linear", "prediction_type": "epsilon", **scheduler}
    for field, known in (("beta_schedule", betas), ("prediction_type", predictions)):
        if named[field] not in known:
            raise InputError(
                f"scheduler_config.json.{field}", f"{named[field]!r} cannot be read; one of {', '.join(known)}"
            )
    if scheduler.get("trained_betas") is not None:
        raise InputError("scheduler_config.json.trained_betas", "cannot be read; only beta_schedule can")
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
            "times": {"name": "discrete"},
            "weighting": {"name": "simple"},
            "learned_variance": learned,
        },
        "sampler": {**sampler, "grid": {"name": "leading"}},
        "guidance": guidance,
    }


def _named(part: Any) -> dict[str, Any]:
    return {"name": part} if isinstance(part, str) else dict(part or {})
