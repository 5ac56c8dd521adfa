"""A run's way of sampling, changed from the command line: text in, the config's `sampler` and `guidance` sections out.

A part is written NAME:keyword=value:keyword=value, as in `dpm_solver_pp:order=3` or `karras:rho=5`.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from diffusion.core.build import build, find
from diffusion.core.checks import at_most
from diffusion.core.types import InputError
from diffusion.pipelines.generator import MOST_STEPS, PLACING, WRAPPERS

AXES = ("sampler", "grid", "steps", "evaluations", "guidance", "interval", "rescale", "threshold", "unroll")


def part(text: str, field: str) -> dict[str, Any]:
    """`heun:churn=40:s_noise=1.003` -> `{"name": "heun", "churn": 40, "s_noise": 1.003}`."""
    name, *pairs = re.split(r":(?=\w+=)", text)  # other colons belong to a value: gs://, a dict
    if not name.isidentifier():
        raise InputError(field, f"{text!r}: wants NAME:keyword=value, as in heun:churn=40:s_noise=1.003")
    return {"name": name} | {key: _value(value) for key, _, value in (pair.partition("=") for pair in pairs)}


def sections(config: Mapping[str, Any], chosen: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The `sampler` and `guidance` sections of a run's config with what was chosen in their place.

    Args:
      chosen: text for any of AXES. A sampler of another name takes steps and grid over, but not the keywords; guidance
        by a number changes the scale alone; `evaluations` of the denoiser stand for the most steps they are enough for.
    """
    sampler, guidance = dict(config["sampler"]), dict(config["guidance"])
    if "sampler" in chosen:
        spec = part(chosen["sampler"], "--sampler")
        find("samplers", spec["name"], field="--sampler")
        kept = {key: sampler[key] for key in PLACING if key in sampler}
        sampler = {**(sampler if spec["name"] == sampler["name"] else kept), **spec}
    if "grid" in chosen:
        sampler["grid"] = part(chosen["grid"], "--grid")
    for name in ("steps", "unroll"):
        if name in chosen:
            sampler[name] = _whole(chosen[name], f"--{name}")
    if "evaluations" in chosen:
        sampler["steps"] = _steps_for(sampler, _whole(chosen["evaluations"], "--evaluations"))
    if "guidance" in chosen:
        text = chosen["guidance"]
        if _value(text.partition(":")[0]) != text.partition(":")[0]:
            guidance["scale"] = _number(text, "--guidance")
        else:
            around = {key: guidance[key] for key in WRAPPERS if key in guidance}
            guidance = {**around, **part(text, "--guidance")}
    if "interval" in chosen:
        guidance["interval"] = _interval(chosen["interval"])
    if "rescale" in chosen:
        guidance["rescale"] = {"factor": _number(chosen["rescale"], "--rescale")}
    if "threshold" in chosen:
        guidance["threshold"] = {"percentile": _number(chosen["threshold"], "--threshold")}
    return sampler, guidance


def _steps_for(sampler: Mapping[str, Any], evaluations: int) -> int:
    """The most steps that a sampler can take with so many evaluations of the denoiser."""
    keywords = {key: value for key, value in sampler.items() if key not in PLACING}
    if keywords.get("variance") == "analytic":  # not measured yet, and of no account here
        keywords["variance"] = "beta"
    solver = build("samplers", keywords, field="sampler")
    if solver.evaluations(1) is None:
        raise InputError("--evaluations", f"{sampler['name']} takes as many as it needs; give --steps")
    fitting = [steps for steps in range(1, evaluations + 1) if solver.evaluations(steps) <= evaluations]
    if not fitting:
        raise InputError("--evaluations", f"one step of {sampler['name']} takes {solver.evaluations(1)}, "
                         f"got {evaluations}")  # fmt: skip
    return fitting[-1]


def _interval(text: str) -> dict[str, Any]:
    low, high, *unit = text.replace(":", ",").split(",") if text.count(",") + text.count(":") else ("", "")
    if not low or not high or unit not in ([], ["t"], ["sigma"]):
        raise InputError("--interval", f"wants lo,hi or lo,hi,sigma, as in 0.2,0.8; got {text!r}")
    ends = {"low": _number(low, "--interval"), "high": _number(high, "--interval")}
    return ends | ({"unit": unit[0]} if unit else {})


def _number(text: str, field: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(field, f"must be a number, got {text!r}") from None


def _whole(text: str, field: str) -> int:
    if not is_whole(text) or int(text) < 1:
        raise InputError(field, f"must be a whole number of at least 1, got {text}")
    return at_most(MOST_STEPS, int(text), field)


def is_whole(text: str) -> bool:
    """Whether it is a whole number, and one short enough that Python would read it."""
    return text.strip().isdecimal() and len(text) < 1000


def _value(text: str) -> Any:
    """A number, true, false or a tuple, as a config would have it; else the text itself."""
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
