"""Reads the config and the data's spec that a checkpoint stores, also those of earlier versions."""

import math
from collections.abc import Mapping
from typing import Any

from diffusion.core.build import call
from diffusion.core.checks import at_most
from diffusion.core.types import ArraySpec, ConditionSpec, InputError, Spec, class_labels, earlier_kind
from diffusion.pipelines.config import check_config, from_json, resolve


def config_and_spec(meta: Any) -> tuple[dict[str, Any], Spec]:
    """Returns the resolved config and the data's spec from a checkpoint's `meta`.

    Raises:
      InputError: `meta` does not have them, or they cannot be used.
    """
    if not isinstance(meta, Mapping) or not {"config", "spec"} <= meta.keys():
        raise InputError("workdir", "its checkpoint does not say what was trained; use another workdir")
    config = from_json(meta["config"])
    if not isinstance(config, Mapping):
        raise InputError("config", f"must be a section, got {config!r}")
    config = resolve({"version": 1, **config})  # configs had no version at first
    check_config(config)
    spec = spec_from_json(meta["spec"])
    if not spec.class_names:  # earlier runs stored no names and had only one order
        for section in (config["data"], config["eval"]["data"]):
            if section.get("name") == "folder":
                section["class_order"] = "name"
    return config, spec


def spec_from_json(stored: Any) -> Spec:
    """Returns the spec that `dataclasses.asdict` has written, or one in the form of earlier checkpoints.

    Raises:
      InputError: It cannot be used.
    """
    stored = from_json(stored)
    if not isinstance(stored, Mapping):
        raise InputError("spec", f"must be a section, got {stored!r}")
    if "x" not in stored:
        spec = call(_earlier_spec, stored, field="spec")
    else:
        sections = stored["x"], stored.get("conditions", {}), *stored.get("conditions", {}).values()
        if not all(isinstance(section, Mapping) for section in sections):
            raise InputError("spec", f"must consist of sections, got {stored!r}")
        conditions = {
            name: call(ConditionSpec, condition, field=f"spec.conditions.{name}")
            for name, condition in stored.get("conditions", {}).items()
        }
        spec = {**stored, "x": call(ArraySpec, stored["x"], field="spec.x"), "conditions": conditions}
        spec = call(Spec, spec, field="spec")
    at_most(10**8, math.prod(spec.shape), "spec.shape")
    for name, condition in spec.conditions.items():
        for key in ("num_classes", "vocabulary", "pooled"):
            at_most(10**7, getattr(condition, key), f"spec.conditions.{name}.{key}")
        at_most(10**8, math.prod(condition.shape), f"spec.conditions.{name}.shape")
    return spec


def _earlier_spec(
    shape: tuple[int, ...], num_classes: int = 0, low: float = 0.0, high: float = 255.0, captions: bool = False
) -> Spec:
    """Returns the spec of a checkpoint from before there were conditions other than labels, and kinds of data."""
    if num_classes < 0:
        raise InputError("num_classes", f"must be at least 0, got {num_classes}")
    return Spec(ArraySpec(shape, earlier_kind(shape, low, high), low, high), class_labels(num_classes), captions)
