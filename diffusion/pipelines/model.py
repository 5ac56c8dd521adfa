"""Builds networks, objectives and autoencoders from configs."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion.core.build import build, build_network, find
from diffusion.core.types import Autoencoder, InputError, Network, Objective, Spec
from diffusion.objectives.base.teacher import Teacher
from diffusion.pipelines.config import cond_drop_rate
from diffusion.pipelines.stored import config_and_spec


class Model(NamedTuple):
    """What is trained and sampled.

    Attributes:
      network: The network, adapted by the config's adapters.
      objective: The training objective.
      autoencoder: The autoencoder whose latents the network models, or None.
    """

    network: Network
    objective: Objective
    autoencoder: Autoencoder | None = None


def build_model(
    config: Mapping[str, Any], spec: Spec, teacher: Teacher | None = None, autoencoder: Autoencoder | None = None, *,
    weights: bool = True,
) -> Model:  # fmt: skip
    """Builds the model of a config.

    Args:
      spec: What the data look like.
      teacher: Replaces the workdir that `objective.teacher` names.
      autoencoder: Replaces the one that the config names.
      weights: See `build_autoencoder`.

    Raises:
      InputError: A part cannot be built, or was an object that the config does not describe.
    """
    for part in ("network", "objective"):
        if "object" in config[part]:
            kind = config[part]["object"]
            problem = f"was an object of type {kind}; pass it: load(workdir, network=..., objective=...)"
            raise InputError(part, problem)
    if autoencoder is None:
        autoencoder = build_autoencoder(config, spec, weights=weights)
    network = build_network(config["network"], model_spec(spec, autoencoder))
    for name, keywords in config["adapters"].items():
        network = build("adapters", {"name": name, **keywords}, field=f"adapters.{name}", network=network)
    objective = {**config["objective"], "teacher": teacher} if teacher else config["objective"]
    return Model(network, build("objectives", objective, field="objective"), autoencoder)


def build_autoencoder(config: Mapping[str, Any], spec: Spec, *, weights: bool = True) -> Autoencoder | None:
    """Builds the autoencoder of a config; None if the config has none, or only says that it was an object.

    Args:
      spec: What the data look like.
      weights: Whether to read its parameters. Otherwise it has their shapes, if it can be built without them.
    """
    section = config["autoencoder"]
    if section is None or "object" in section:
        return None
    parameters = inspect.signature(find("autoencoders", section["name"], field="autoencoder.name")).parameters
    given = {"weights": weights} if "weights" in parameters else {}
    return build("autoencoders", section, field="autoencoder", shape=spec.shape, **given)


def model_of(meta: Mapping[str, Any], autoencoder: Autoencoder | None = None) -> Model:
    """Builds the model that a checkpoint's `meta` describes, including its teacher and that teacher's own.

    Args:
      autoencoder: Replaces the one that the config names, also for a teacher that was trained with it.

    Raises:
      InputError: A part cannot be built, or the autoencoder's file is not the one that the model was trained with.
    """
    config, spec = config_and_spec(meta)
    if autoencoder is None:
        autoencoder = build_autoencoder(config, spec)
    check_autoencoder(meta, autoencoder)
    return build_model(config, spec, teacher_of(meta, autoencoder), autoencoder)


def with_autoencoder(meta: Mapping[str, Any], part: str | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's `meta` with another autoencoder in its config.

    Args:
      part: A name or a section. What it leaves out stays as it is, unless it names an autoencoder of another kind.
    """
    config, _ = config_and_spec(meta)
    section, theirs = {"name": part} if isinstance(part, str) else dict(part), config["autoencoder"] or {}
    if section.get("name") in (None, theirs.get("name")):
        section = {**theirs, **section}
    return {**meta, "config": {**config, "autoencoder": section}}


def check_autoencoder(meta: Mapping[str, Any], autoencoder: Autoencoder | None) -> None:
    """Checks that an autoencoder is the one that the run of a checkpoint's `meta` was trained with.

    Raises:
      InputError: It is missing, or it has other parameters.
    """
    recorded = meta.get("autoencoder", {}).get("sha256")
    if recorded is None:
        return
    if autoencoder is None:
        problem = "is missing, and the run models the latents of one; pass it: load(workdir, autoencoder=...)"
        raise InputError("autoencoder", problem)
    if recorded != autoencoder.digest:
        problem = "is not the file that the model was trained with; restore it"
        raise InputError("autoencoder.path", f"{problem} (SHA-256 {recorded[:12]}..., "
                         f"got {autoencoder.digest[:12]}...)")  # fmt: skip


def teacher_of(meta: Mapping[str, Any], autoencoder: Autoencoder | None = None) -> Teacher | None:
    """Builds the teacher of the model that a checkpoint's `meta` describes; None if there is none.

    Args:
      autoencoder: Replaces that of a teacher that was trained with it.
    """
    if "teacher" not in meta:
        return None
    theirs = meta["teacher"]
    config, spec = config_and_spec(theirs)
    recorded = theirs.get("autoencoder", {}).get("sha256")
    shared = autoencoder if recorded and autoencoder and autoencoder.digest == recorded else None
    model = model_of(theirs, shared)
    spec = model_spec(spec, model.autoencoder)
    return Teacher(model.network, model.objective, spec, cond_drop_rate(config, spec))


def model_spec(spec: Spec, autoencoder: Autoencoder | None) -> Spec:
    """Returns the spec of what the network models: the data, or the latents of an autoencoder."""
    return spec if autoencoder is None else autoencoder.latent_spec(spec)
