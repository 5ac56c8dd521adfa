"""Builds networks and objectives from configs."""

from collections.abc import Mapping
from typing import Any

from diffusion.core.build import build, build_network
from diffusion.core.types import InputError, Network, Objective, Spec
from diffusion.objectives.base.teacher import Teacher
from diffusion.pipelines.config import cond_drop_rate, config_and_spec


def network_and_objective(
    config: Mapping[str, Any], spec: Spec, teacher: Teacher | None = None
) -> tuple[Network, Objective]:
    """Builds the model of a config.

    Args:
      spec: What the data look like.
      teacher: Replaces the workdir that `objective.teacher` names.

    Raises:
      InputError: A part cannot be built, or was an object that the config does not describe.
    """
    for part in ("network", "objective"):
        if "object" in config[part]:
            kind = config[part]["object"]
            problem = f"was an object of type {kind}; pass it: load(workdir, network=..., objective=...)"
            raise InputError(part, problem)
    network = build_network(config["network"], spec)
    objective = {**config["objective"], "teacher": teacher} if teacher else config["objective"]
    return network, build("objectives", objective, field="objective")


def model_of(meta: Mapping[str, Any]) -> tuple[Network, Objective]:
    """Builds the model that a checkpoint's `meta` describes, including its teacher and that teacher's own."""
    return network_and_objective(*config_and_spec(meta), teacher_of(meta))


def teacher_of(meta: Mapping[str, Any]) -> Teacher | None:
    """Builds the teacher of the model that a checkpoint's `meta` describes; None if there is none."""
    if "teacher" not in meta:
        return None
    theirs = meta["teacher"]
    config, spec = config_and_spec(theirs)
    return Teacher(*model_of(theirs), spec, cond_drop_rate(config, spec))
