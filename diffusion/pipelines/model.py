"""Builds networks, objectives and encoders from configs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion.core.build import build, build_accepting, build_network, model_spec
from diffusion.core.types import Autoencoder, InputError, Network, Objective, Source, Spec, TextEncoder
from diffusion.data import captions
from diffusion.encoders import text_conditions
from diffusion.objectives.base.teacher import Teacher
from diffusion.pipelines.config import cond_drop_rate
from diffusion.pipelines.stored import config_and_spec


class Model(NamedTuple):
    """What is trained and sampled.

    Attributes:
      network: The network, adapted by the config's adapters.
      objective: The training objective.
      autoencoder: The autoencoder whose latents the network models, or None.
      text_encoder: What turns captions and prompts into the condition `text`, or None.
    """

    network: Network
    objective: Objective
    autoencoder: Autoencoder | None = None
    text_encoder: TextEncoder | None = None

    def spec(self, data: Spec) -> Spec:
        """Returns the spec of what the network models, from that of the data."""
        return model_spec(data, self.autoencoder, self.text_encoder)


def build_model(
    config: Mapping[str, Any], spec: Spec, teacher: Teacher | None = None, autoencoder: Autoencoder | None = None,
    text_encoder: TextEncoder | None = None, *, weights: bool = True, source: Source | None = None,
    tokenizer: str | None = None, network: Network | None = None,
) -> Model:  # fmt: skip
    """Builds the model of a config.

    Args:
      spec: What the data look like.
      teacher: Replaces the workdir that `objective.teacher` names.
      autoencoder, text_encoder: Replace those that the config names.
      weights: See `build_autoencoder`.
      source, tokenizer: See `build_text_encoder`.
      network: The network that the config describes, if it has been built.

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
    if text_encoder is None:
        text_encoder = build_text_encoder(config, weights=weights, source=source, tokenizer=tokenizer)
    if network is None:
        network = build_network(config["network"], model_spec(spec, autoencoder, text_encoder))
    network = text_conditions.attached(network, text_encoder)
    for name, keywords in config["adapters"].items():
        network = build("adapters", {"name": name, **keywords}, field=f"adapters.{name}", network=network)
    objective = {**config["objective"], "teacher": teacher} if teacher else config["objective"]
    return Model(network, build("objectives", objective, field="objective"), autoencoder, text_encoder)


def build_autoencoder(config: Mapping[str, Any], spec: Spec, *, weights: bool = True) -> Autoencoder | None:
    """Builds the autoencoder of a config; None if the config has none, or only says that it was an object.

    Args:
      spec: What the data look like.
      weights: Whether to read its parameters. Otherwise it has their shapes, if it can be built without them.
    """
    section = config["autoencoder"]
    if section is None or "object" in section:
        return None
    return build_accepting("autoencoders", section, field="autoencoder", shape=spec.shape, weights=weights)


def build_text_encoder(
    config: Mapping[str, Any], *, weights: bool = True, source: Source | None = None, tokenizer: str | None = None
) -> TextEncoder | None:
    """Builds the text encoder of a config; None if the config has none, or only says that it was an object.

    Args:
      weights: Whether to read its parameters. Otherwise it has their shapes.
      source: The data, to whose captions a tokenizer may be fitted.
      tokenizer: The tokenizer that a run has stored, which is used in place of a fitted one.
    """
    section = config["text_encoder"]
    if section is None or "object" in section:
        return None
    given = {"weights": weights, "stored": tokenizer}
    if source is not None:
        given |= {"captions": captions.of_source(source), "num_captions": len(source)}
    return build_accepting("text_encoders", section, field="text_encoder", **given)


def model_of(
    meta: Mapping[str, Any], autoencoder: Autoencoder | None = None, text_encoder: TextEncoder | None = None,
    source: Source | None = None,
) -> Model:  # fmt: skip
    """Builds the model that a checkpoint's `meta` describes, including its teacher and that teacher's own.

    Args:
      autoencoder: Replaces the one that the config names, also for a teacher that was trained with it.
      text_encoder: Likewise.
      source: See `build_text_encoder`.

    Raises:
      InputError: A part cannot be built, or an encoder's files are not those that the model was trained with.
    """
    config, spec = config_and_spec(meta)
    if autoencoder is None:
        autoencoder = build_autoencoder(config, spec)
    check_autoencoder(meta, autoencoder)
    if text_encoder is None:
        recorded = meta.get("text_encoder") or meta.get("teacher", {}).get("text_encoder", {})  # that of its teacher
        stored = recorded.get("tokenizer")
        text_encoder = build_text_encoder(config, source=source, tokenizer=stored)
    check_text_encoder(meta, text_encoder)
    return build_model(config, spec, teacher_of(meta, autoencoder, text_encoder), autoencoder, text_encoder)


def with_section(meta: Mapping[str, Any], name: str, part: str | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's `meta` with another part in its config.

    Args:
      name: The section, such as `autoencoder`.
      part: A name or a section. What it leaves out stays as it is, unless it names a part of another kind.
    """
    config, _ = config_and_spec(meta)
    section, theirs = {"name": part} if isinstance(part, str) else dict(part), config[name] or {}
    if section.get("name") in (None, theirs.get("name")):
        section = {**theirs, **section}
    return {**meta, "config": {**config, name: section}}


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


def check_text_encoder(meta: Mapping[str, Any], encoder: TextEncoder | None) -> None:
    """Checks that a text encoder is the one that the run of a checkpoint's `meta` was trained with.

    Raises:
      InputError: It is missing, or it has other parameters or another tokenizer.
    """
    recorded = meta.get("text_encoder")
    if recorded is None:
        return
    if encoder is None:
        problem = "is missing, and the run reads text; pass it: load(workdir, text_encoder=...)"
        raise InputError("text_encoder", problem)
    if recorded["sha256"] != encoder.digest:
        problem = "does not hold the text encoder that the model was trained with; restore it"
        raise InputError("text_encoder.path", f"{problem} (SHA-256 {recorded['sha256'][:12]}..., "
                         f"got {encoder.digest[:12]}...)")  # fmt: skip


def teacher_of(
    meta: Mapping[str, Any], autoencoder: Autoencoder | None = None, text_encoder: TextEncoder | None = None
) -> Teacher | None:
    """Builds the teacher of the model that a checkpoint's `meta` describes; None if there is none.

    Args:
      autoencoder, text_encoder: Replace those of a teacher that was trained with them.

    Raises:
      InputError: The teacher reads text of another encoder, or cannot be built.
    """
    if "teacher" not in meta:
        return None
    theirs = meta["teacher"]
    config, spec = config_and_spec(theirs)
    recorded = theirs.get("autoencoder", {}).get("sha256")
    shared = autoencoder if recorded and autoencoder and autoencoder.digest == recorded else None
    if "text_encoder" in theirs and theirs["text_encoder"] != getattr(text_encoder, "record", None):
        raise InputError("text_encoder", "must be that of the objective's teacher, with the same tokenizer")
    model = model_of(theirs, shared, text_encoder if "text_encoder" in theirs else None)
    spec = model.spec(spec)
    return Teacher(model.network, model.objective, spec, cond_drop_rate(config, spec))
