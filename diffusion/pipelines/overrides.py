"""Changes how a run samples, from text: returns the config's `sampler` and `guidance` sections with options replaced.

A part is written NAME:keyword=value:keyword=value, for example `dpm_solver_pp:order=3` or `karras:rho=5`.
"""

import re
from collections.abc import Mapping
from typing import Any

from diffusion.core.build import build, find
from diffusion.core.checks import at_most
from diffusion.core.types import InputError
from diffusion.pipelines.config import parse_value
from diffusion.pipelines.generator import MOST_STEPS, PLACING, WRAPPERS

AXES = ("sampler", "grid", "steps", "evaluations", "guidance", "interval", "rescale", "threshold", "unroll")


def part(text: str, field: str) -> dict[str, Any]:
    """Parses a part: `heun:churn=40:s_noise=1.003` -> `{"name": "heun", "churn": 40, "s_noise": 1.003}`."""
    name, *pairs = re.split(r":(?=\w+=)", text)  # any other colon is part of a value: gs://, a dict
    if not name.isidentifier():
        raise InputError(field, f"must be NAME:keyword=value, as in heun:churn=40:s_noise=1.003, got {text!r}")
    return {"name": name} | {key: parse_value(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def spell(section: str | Mapping[str, Any]) -> str:
    """Writes a part as `part` reads it: `{"name": "heun", "churn": 5}` -> `heun:churn=5`."""
    section = {"name": section} if isinstance(section, str) else section
    return ":".join([section["name"], *(f"{key}={value}" for key, value in section.items() if key != "name")])


def with_options(
    config: Mapping[str, Any], *, sampler: Any = None, steps: int | None = None, grid: Any = None, guidance: Any = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the `sampler` and `guidance` sections of a config with the given options in their place.

    Args:
      sampler: A part. One of another name keeps the steps and the grid, but not the options of the one it replaces.
      steps, grid: Options of the sampler's section.
      guidance: A number, which changes only the scale, or a part, which keeps the wrappers.
    """
    section, guided = dict(config["sampler"]), dict(config["guidance"])
    if sampler is not None:
        given = dict(sampler) if isinstance(sampler, Mapping) else {"name": sampler}
        same = given["name"] == section["name"]
        section = {**{key: value for key, value in section.items() if same or key in PLACING}, **given}
    section |= {} if steps is None else {"steps": steps}
    section |= {} if grid is None else {"grid": grid}
    if isinstance(guidance, (int, float)):
        guided["scale"] = float(guidance)
    elif guidance is not None:
        given = dict(guidance) if isinstance(guidance, Mapping) else {"name": guidance}
        guided = {**{key: value for key, value in guided.items() if key in WRAPPERS}, **given}
    return section, guided


def sections(config: Mapping[str, Any], chosen: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the `sampler` and `guidance` sections of a run's config with the chosen options replaced.

    Args:
      config: The run's config.
      chosen: Text for any of `AXES`. Another sampler keeps the steps and the grid, but not the keywords of the sampler
        it replaces. A number for `guidance` changes only the scale. `evaluations` sets the largest number of steps
        that needs no more evaluations of the denoiser.

    Raises:
      InputError: Text that cannot be parsed, an unknown sampler, or too few evaluations; the field is the flag.
    """
    given: dict[str, Any] = {}
    if "sampler" in chosen:
        given["sampler"] = part(chosen["sampler"], "--sampler")
        find("samplers", given["sampler"]["name"], field="--sampler")
    if "grid" in chosen:
        given["grid"] = part(chosen["grid"], "--grid")
    if "steps" in chosen:
        given["steps"] = _positive_integer(chosen["steps"], "--steps")
    if "guidance" in chosen:
        text = chosen["guidance"]
        is_number = parse_value(text.partition(":")[0]) != text.partition(":")[0]
        given["guidance"] = _number(text, "--guidance") if is_number else part(text, "--guidance")
    sampler, guidance = with_options(config, **given)
    if "unroll" in chosen:
        sampler["unroll"] = _positive_integer(chosen["unroll"], "--unroll")
    if "evaluations" in chosen:
        sampler["steps"] = _steps_for(sampler, _positive_integer(chosen["evaluations"], "--evaluations"))
    if "interval" in chosen:
        guidance["interval"] = _interval(chosen["interval"])
    if "rescale" in chosen:
        guidance["rescale"] = _with_number("factor", chosen["rescale"], "--rescale")
    if "threshold" in chosen:
        guidance["threshold"] = _with_number("percentile", chosen["threshold"], "--threshold")
    return sampler, guidance


def is_whole(text: str) -> bool:
    """Returns whether a text is a whole number, and short enough for `int` to parse."""
    return text.strip().isdecimal() and len(text) < 1000


def _steps_for(sampler: Mapping[str, Any], evaluations: int) -> int:
    """Returns the largest number of steps that needs at most `evaluations` evaluations of the denoiser."""
    grid = sampler.get("grid", "trailing")
    name = grid["name"] if isinstance(grid, Mapping) else grid
    make = find("grids", name, field="sampler.grid.name")
    if getattr(make, "may_rise", False):
        raise InputError("--evaluations", f"the grid {name} repeats steps; use --steps")
    keywords = {key: value for key, value in sampler.items() if key not in PLACING}
    if keywords.get("variance") == "analytic":  # needs measurements, but does not change the number of evaluations
        keywords["variance"] = "beta"
    solver = build("samplers", keywords, field="sampler")
    counts = [solver.evaluations(steps, getattr(make, "to_data", True)) for steps in range(1, evaluations + 1)]
    if counts[0] is None:
        raise InputError("--evaluations", f"{sampler['name']} chooses its own number of evaluations; use --steps")
    fitting = [steps for steps, count in enumerate(counts, 1) if count <= evaluations]
    if not fitting:
        raise InputError("--evaluations", f"one step of {sampler['name']} takes {counts[0]}, "
                         f"got {evaluations}")  # fmt: skip
    return fitting[-1]


def _interval(text: str) -> dict[str, Any]:
    low, high, *unit = text.replace(":", ",").split(",") if text.count(",") + text.count(":") else ("", "")
    if not low or not high or unit not in ([], ["t"], ["sigma"]):
        raise InputError("--interval", f"must be lo,hi or lo,hi,sigma, as in 0.2,0.8; got {text!r}")
    ends = {"low": _number(low, "--interval"), "high": _number(high, "--interval")}
    return ends | ({"unit": unit[0]} if unit else {})


def _with_number(key: str, text: str, field: str) -> dict[str, Any]:
    """Parses options of which the first is a number: `0.99:keep_noise=true`."""
    number, *pairs = re.split(r":(?=\w+=)", text)
    options = (pair.partition("=") for pair in pairs)
    return {key: _number(number, field)} | {name: parse_value(value) for name, _, value in options}


def _number(text: str, field: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(field, f"must be a number, got {text!r}") from None


def _positive_integer(text: str, field: str) -> int:
    if not is_whole(text) or int(text) < 1:
        raise InputError(field, f"must be a whole number of at least 1, got {text}")
    return at_most(MOST_STEPS, int(text), field)
