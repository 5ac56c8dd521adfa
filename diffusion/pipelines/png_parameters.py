"""The text `parameters` of PNG files, by which tools of Stable Diffusion show how a picture was made.

Its form is that of stable-diffusion-webui:

    a red circle
    Negative prompt: a green triangle
    Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 0, Sample: 3, Size: 512x512, Model: sd15

Samplers that it knows have its names. `Sample` is not one of its entries: here a sample depends on the seed and its
index.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

KEYWORD = "parameters"
_SAMPLERS = {
    "ddim": "DDIM", "euler": "Euler", "euler_ancestral": "Euler a", "heun": "Heun", "lms": "LMS", "dpm2": "DPM2",
    "dpm2_ancestral": "DPM2 a", "dpm_solver_pp_sde": "DPM++ SDE", "unipc": "UniPC", "pndm": "PLMS", "lcm": "LCM",
}  # fmt: skip
_GRIDS = {"karras": "Karras", "exponential": "Exponential"}


def parameters(
    settings: Mapping[str, Any], size: tuple[int, int], index: int, prompt: str | None = None
) -> str:  # fmt: skip
    """Returns the text of one sample.

    Args:
      settings: `workdir`, `seed` and the sections `sampler` and `guidance`; optionally `negative_prompt` and
        `clip_skip`.
      size: Height and width.
      index: The index of the sample.
      prompt: What it shows; None for a model that reads no text.
    """
    sampler, guidance = settings["sampler"], settings["guidance"]
    entries = {"Steps": sampler["steps"], "Sampler": _sampler_name(sampler)}
    if (grid := _grid_name(sampler.get("grid"))) in _GRIDS:
        entries["Schedule type"] = _GRIDS[grid]
    if isinstance(guidance.get("scale"), (int, float)):
        entries["CFG scale"] = f"{guidance['scale']:g}"
    entries |= {"Seed": settings["seed"], "Sample": index, "Size": f"{size[1]}x{size[0]}",
                "Model": os.path.basename(os.path.abspath(settings["workdir"]))}  # fmt: skip
    if settings.get("clip_skip"):
        entries["Clip skip"] = settings["clip_skip"] + 1  # which counts from the last layer
    lines = [] if prompt is None else [prompt]
    if settings.get("negative_prompt"):
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    return "\n".join([*lines, ", ".join(f"{key}: {_quoted(str(value))}" for key, value in entries.items())])


def _sampler_name(sampler: Mapping[str, Any]) -> str:
    name, order, sde = sampler["name"], sampler.get("order", 2), sampler.get("sde", False)
    if name == "dpm_solver_pp" and not sampler.get("singlestep") and (order == 2 or (order == 3 and sde)):
        return f"DPM++ {order}M{' SDE' if sde else ''}"
    return _SAMPLERS.get(name, str(name))


def _grid_name(grid: str | Mapping[str, Any] | None) -> str | None:
    """Returns the name of a grid, or of that inside `to_sigma_min`."""
    if isinstance(grid, Mapping):
        return _grid_name(grid["grid"]) if "grid" in grid else grid["name"]
    return grid


def _quoted(value: str) -> str:
    """Returns a value in quotes if it has what separates entries."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ",:\n") else value
