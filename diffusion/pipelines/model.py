"""Builds networks and objectives from configs."""

from collections.abc import Mapping
from typing import Any

from diffusion.core.build import build
from diffusion.core.types import Network, Objective, Spec
from diffusion.objectives.base.teacher import Teacher
from diffusion.pipelines.config import cond_drop_rate, config_and_spec


def network_and_objective(
    config: Mapping[str, Any], spec: Spec, teacher: Teacher | None = None
) -> tuple[Network, Objective]:
    """The model of a config for data of a spec; `teacher` stands for the workdir that the objective names one by."""
    network = build("networks", config["network"], field="network", shape=spec.shape, num_classes=spec.num_classes)
    objective = {**config["objective"], "teacher": teacher} if teacher else config["objective"]
    return network, build("objectives", objective, field="objective")


def model_of(meta: Mapping[str, Any]) -> tuple[Network, Objective]:
    """The model that a checkpoint's `meta` describes, its teacher and the teacher's own included."""
    return network_and_objective(*config_and_spec(meta), teacher_of(meta))


def teacher_of(meta: Mapping[str, Any]) -> Teacher | None:
    """The teacher of the model that a checkpoint's `meta` describes."""
    if "teacher" not in meta:
        return None
    theirs = meta["teacher"]
    config, spec = config_and_spec(theirs)
    return Teacher(*model_of(theirs), spec, cond_drop_rate(config))
