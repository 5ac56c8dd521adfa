"""Checks configs and reads them back from checkpoints."""

import math
from collections.abc import Mapping
from typing import Any

from diffusion.core.build import call, check, find
from diffusion.core.checks import at_most
from diffusion.core.types import InputError, Spec
from diffusion.pipelines.generator import MOST_SAMPLES
from diffusion.training.trainer import Options

SECTIONS = ("seed", "data", "objective", "network", "optimizer", "ema", "train", "checkpoint", "sampler", "guidance",
            "eval", "mesh", "sharding")  # fmt: skip


def check_sections(config: Mapping[str, Any]) -> None:
    """A config has exactly the sections there are: one that nothing reads would be a wish not granted."""
    for name in config:
        if name not in SECTIONS:
            raise InputError(f"config.{name}", f"no such section; one of: {', '.join(SECTIONS)}")
    for name in SECTIONS:
        if name not in config:
            raise InputError(f"config.{name}", "is missing")
        if not isinstance(config[name], int if name == "seed" else Mapping):
            raise InputError(f"config.{name}", f"must be {'an integer' if name == 'seed' else 'a section'}")
    if not 0 <= config["seed"] < 2**32:
        raise InputError("config.seed", f"must be from 0 to 2^32 - 1, got {config['seed']}")
    section = call(_eval, config["eval"], field="eval")
    for name, options in section["metrics"].items():
        field = f"eval.metrics.{name}"
        metric = find("evaluation", name, field="eval.metrics")
        if not isinstance(options, Mapping):
            raise InputError(field, f"must be a section, as {{'num': 1000}}, got {options!r}")
        check(metric, options, field=field, later=("train", "held_out"))
        at_most(MOST_SAMPLES, options.get("num", 0), f"{field}.num")


def _eval(data: Mapping[str, Any], metrics: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `eval` section: held-out `data`, and the keywords of each metric by its name."""
    return {"data": data, "metrics": metrics}


def from_json(value: Any) -> Any:
    """JSON's lists back to the tuples that configs are written with."""
    if isinstance(value, Mapping):
        return {key: from_json(item) for key, item in value.items()}
    return tuple(from_json(item) for item in value) if isinstance(value, list) else value


def config_and_spec(meta: Any) -> tuple[dict[str, Any], Spec]:
    """The config that a checkpoint's `meta` holds, and what its data are. Raises InputError if it is no such thing."""
    if not isinstance(meta, Mapping) or not {"config", "spec"} <= meta.keys():
        raise InputError("workdir", "its checkpoint does not say what was trained; train anew in another workdir")
    config, spec = from_json(meta["config"]), from_json(meta["spec"])
    for name, section in (("config", config), ("spec", spec)):
        if not isinstance(section, Mapping):
            raise InputError(name, f"must be a section, got {section!r}")
    check_sections(config)
    found = call(Spec, spec, field="spec")
    if not found.shape or min(found.shape) < 1 or found.num_classes < 0:
        raise InputError("spec", f"describes no data: {found}")
    at_most(10**8, math.prod(found.shape), "spec.shape")
    at_most(10**7, found.num_classes, "spec.num_classes")
    return config, found


def cond_drop_rate(config: Mapping[str, Any]) -> float:
    """The share of examples that a model was trained on without their condition."""
    return call(Options, config["train"], field="train").cond_drop_rate
