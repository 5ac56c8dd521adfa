"""Converts between the workdirs of runs and the folders of diffusers, or single files of Stable Diffusion."""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from diffusion.core import files, single_file
from diffusion.core.types import ArraySpec, InputError, Spec
from diffusion.encoders import autoencoder_folder, text_conditions
from diffusion.interop import diffusers_models, diffusers_pipeline, original_file, schedulers
from diffusion.interop.diffusers_pipeline import Pipeline
from diffusion.pipelines import autoencoder_training, weight_reference
from diffusion.pipelines.build_training import training
from diffusion.pipelines.config import check_config, resolve
from diffusion.pipelines.generator import PLACING
from diffusion.pipelines.model import Model, build_model
from diffusion.pipelines.overrides import spell
from diffusion.pipelines.run import Run, open_run
from diffusion.training.checkpoint import REFERENCE, Checkpoints
from diffusion.training.state import init_state

BaseConfig = Callable[[str, str | None], Mapping[str, Any]]


def export_run(
    workdir: str, folder: str, *, ema: str | None = None, step: int | None = None, shift: bool = False
) -> str:
    """Writes a run as a diffusers pipeline, or as a model if diffusers has no scheduler for its objective.

    An autoencoder is written as a model with the scale of its latents.

    Args:
      workdir: The workdir of the run.
      folder: The folder to write.
      ema: The average of the parameters to write: the config's last if None, the raw parameters if "none".
      step: The step of the checkpoint; the newest if None.
      shift: For an autoencoder, write the mean of its latents as their shift.

    Returns:
      What was written, in words.

    Raises:
      InputError: The run cannot be read, or diffusers has no such model.
    """
    run = open_run(workdir, ema, step)
    if hasattr(run.objective, "reconstruct"):
        with files.new_folder(folder, "--to") as partial:
            return autoencoder_training.write_folder(run, partial, shift)
    if shift:
        raise InputError("--shift", "is for runs that train an autoencoder; leave it out")
    model = _network(run)
    with files.new_folder(folder, "--to") as partial:
        return diffusers_pipeline.write(partial, model, run.config)


def export_file(
    workdir: str, path: str, *, ema: str | None = None, step: int | None = None, dtype: original_file.Dtype = "float16"
) -> str:
    """Writes a run with its autoencoder and text encoders as a single file in the original layout of Stable Diffusion.

    Args:
      workdir, ema, step: See `export_run`.
      path: The file, which must not exist.
      dtype: The dtype of all tensors.

    Returns:
      What was written, in words.

    Raises:
      InputError: The run cannot be read, or such a file cannot hold its model.
    """
    if os.path.exists(path):
        raise InputError("--to", f"{path} exists; choose another name")
    run = open_run(workdir, ema, step)
    model = _network(run)
    files.make_folder(os.path.dirname(os.path.abspath(path)), "--to")
    title = os.path.splitext(os.path.basename(path))[0]
    with files.writing(path, "--to"):
        return original_file.write(path, model, run.config, dtype=dtype, title=title)


def _network(run: Run) -> diffusers_models.Model:
    """Returns the network of a run. Raises InputError if it has several."""
    if run.params.keys() != {"net"}:
        raise InputError("--from", f"the run trains {', '.join(run.params)}; a diffusers model has a single network")
    params = dict(jax.device_get(run.params["net"]))
    text_params = params.pop(text_conditions.OWN, None)
    return diffusers_models.Model(run.config["network"], run.model.spec(run.spec), params, text_encoder=text_params)


class _Found(NamedTuple):
    """A model that is about to become a run.

    Attributes:
      config: The resolved config of the run.
      spec: What the samples look like.
      model: The network with the encoders that the config names.
      weights: The network's weights, or their shapes.
    """

    config: Mapping[str, Any]
    spec: Spec
    model: Model
    weights: diffusers_models.Model


def import_folder(
    folder: str, workdir: str, base_config: BaseConfig, *, null_class: bool = False, variant: str | None = None,
    tokenizer: str | None = None,
) -> str:  # fmt: skip
    """Writes a diffusers model or pipeline, or a single file of Stable Diffusion, as a run at step 0.

    The run refers to the weights of the network, and to the autoencoder and the text encoders of a pipeline that reads
    a text, by their paths. Without encoders, a model of latents samples latents. The folder does not say how often
    training dropped the class or the text; a model with a null class or a text counts as one that was trained with 10 %
    of it, unless the config says otherwise.

    Args:
      folder: The folder of the model or the pipeline, or the file.
      workdir: The workdir to write.
      base_config: Returns the config that completes a network of the given name in a pipeline of the given class, which
        is None for a model alone, for the sections that the folder does not determine.
      null_class: Whether the last class of a U-Net is the one for unconditional samples.
      variant: The variant of the weights, such as `fp16`; None: the weights without one, or the only ones.
      tokenizer: For a file, which has none, the folder of CLIP's tokenizer, or that of a pipeline with it.

    Returns:
      What was written, in words.

    Raises:
      InputError: The folder cannot be read, or the workdir not be written.
    """
    is_file = single_file.split(folder) == (folder, "")
    if is_file and tokenizer is None:
        problem = f"must be given, as {folder} has none; use a folder with CLIP's vocabulary, or that of a pipeline"
        raise InputError("--tokenizer", problem)
    if tokenizer and not is_file:
        raise InputError("--tokenizer", "is for single files, which have none; leave it out")
    try:
        pipeline = diffusers_pipeline.read(folder, null_class=null_class, variant=variant, weights="checked")
        if tokenizer:
            pipeline.sections["text_encoder"]["tokenizer"] = tokenizer
        found = _found(pipeline, base_config)
    except InputError as error:
        raise error.within("--from") from None
    _write_run(workdir, found, weight_reference.record(folder, null_class, variant, pipeline.model.digest))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(found.weights.params))
    origin = "from its scheduler" if pipeline.sections else "from the config, as there is no scheduler"
    encoders = [part for part in ("autoencoder", "text_encoder") if getattr(found.model, part)]
    parts = "".join(f"; {part} from {found.config[part]['path']}" for part in encoders)
    return (
        f"{found.config['network']['name']}, {count:,} parameters; objective {origin}{parts}; data "
        f"({found.config['data']['name']}), optimizer and metrics from the config"
    )


def describe_folder(
    folder: str, base_config: BaseConfig, *, null_class: bool = False, variant: str | None = None
) -> str:
    """Returns what `import_folder` would find, a line per part, without reading numbers of the weights.

    Args:
      folder, base_config, null_class, variant: See `import_folder`. A file needs no tokenizer for this.

    Raises:
      InputError: The folder cannot be read.
    """
    try:
        pipeline = diffusers_pipeline.read(folder, null_class=null_class, variant=variant, weights="named")
        found = _found(pipeline, base_config, weights=False)
    except InputError as error:
        raise error.within("--from") from None
    config, model, sections = found.config, found.model, pipeline.sections or {}

    def size(shape: Sequence[int]) -> str:
        return " x ".join(map(str, shape))

    def part(name: str, params: Any, *more: str) -> str:
        count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
        return ", ".join([config[name]["name"], f"{count:,} parameters", *more])

    lines = {"folder": f"{pipeline.kind or 'a model alone'}, draws {size(found.spec.shape)}"}
    lines["network"] = part("network", found.weights.params, f"models {size(found.weights.spec.shape)}")
    if model.autoencoder:
        lines["autoencoder"] = part("autoencoder", model.autoencoder.params, config["autoencoder"]["path"])
    if model.text_encoder:
        text = model.text_encoder.condition
        widths = f"{text.shape[0]} tokens of width {text.shape[1]}" + (f", pooled {text.pooled}" if text.pooled else "")
        lines["text_encoder"] = part("text_encoder", model.text_encoder.params, widths, config["text_encoder"]["path"])
    others = [name for name in found.spec.conditions if name != "text"]
    if others:
        lines["conditions"] = ", ".join(f"{name} {size(found.spec.conditions[name].shape)}" for name in others)
    if not sections:
        return _table(lines | {"scheduler": "none; objective, sampler and guidance are those of the config"})
    sampler = {key: value for key, value in sections["sampler"].items() if key not in PLACING}
    grid, steps = sections["sampler"]["grid"], sections["sampler"]["steps"]
    lines["prediction"] = schedulers.prediction_of(sections["objective"])
    lines["scheduler"] = pipeline.scheduler or "DDPMScheduler"
    lines["sampler"] = f"{spell(sampler)}, {steps} steps on the grid {spell(grid)}"
    lines["guidance"] = spell(sections["guidance"])
    return _table(lines)


def _table(lines: Mapping[str, str]) -> str:
    return "\n".join(f"{name:<13} {text}" for name, text in lines.items())


def _found(pipeline: Pipeline, base_config: BaseConfig, weights: bool = True) -> _Found:
    """Completes the config of a pipeline and builds its model, with the parameters of the encoders if `weights`.

    Raises:
      InputError: The config is invalid, or the parts of the pipeline do not fit together.
    """
    model, spec = pipeline.model, pipeline.model.spec
    base = base_config(model.network["name"], pipeline.kind)
    config = {**base, "autoencoder": None, **(pipeline.sections or {}), "network": dict(model.network)}
    config["train"] = {**config.get("train", {}), "cond_drop_rate": _drop_rate(config, model)}
    config = resolve(config)
    check_config(config)
    if config["autoencoder"]:
        factor = autoencoder_folder.factor_of(config["autoencoder"]["path"])
        height, width, _ = spec.shape
        others = {name: condition for name, condition in spec.conditions.items() if condition.kind != "text"}
        spec = Spec(ArraySpec((factor * height, factor * width, 3)), others, captions=True)
    built = build_model(config, spec, weights=weights, network=model.built)
    _check_fit(built.spec(spec), model.spec)
    return _Found(config, spec, built, model)


def _drop_rate(config: Mapping[str, Any], model: diffusers_models.Model) -> float | Mapping[str, float]:
    """Returns `train.cond_drop_rate`, which is above 0 if the model has a null class or a text, so that it can be
    guided."""
    has_text = any(condition.kind == "text" for condition in model.spec.conditions.values())
    if not has_text and (not model.spec.num_classes or not model.network.get("null_class", True)):
        return 0.0
    return config.get("train", {}).get("cond_drop_rate") or 0.1


def _check_fit(given: Spec, expected: Spec) -> None:
    """Raises InputError if a network cannot read what the encoders of its pipeline return.

    Args:
      given: The latents and the text of the encoders.
      expected: Those of the network.
    """
    if given.shape != expected.shape:
        problem = f"has latents of {given.shape[-1]} channels, and the network reads {expected.shape[-1]}"
        raise InputError("autoencoder", f"{problem}; they are of different models")
    for name, text in expected.conditions.items():
        theirs = given.conditions[name]
        if text.kind == "text" and (theirs.shape[1], theirs.pooled) != (text.shape[1], text.pooled):
            widths = f"{text.shape[1]} and {text.pooled}"
            problem = f"has vectors of width {theirs.shape[1]} and a pooled one of {theirs.pooled}, and the network"
            raise InputError("text_encoder", f"{problem} reads {widths}; they are of different models")


def _write_run(workdir: str, found: _Found, weights: Mapping[str, Any]) -> None:
    """Writes a run at step 0, whose checkpoint has no arrays of the network but a reference to them."""
    config, model = found.config, found.model
    keywords = training(config)
    network = dataclasses.replace(model.network, init=lambda key: {})
    state = init_state(model.objective, network, keywords["optimizer"], keywords["ema"], jax.random.key(0))
    meta: dict[str, Any] = {"config": config, "spec": dataclasses.asdict(found.spec), REFERENCE: weights}
    if model.autoencoder:
        meta["autoencoder"] = {"sha256": model.autoencoder.digest}
    if model.text_encoder:
        meta["text_encoder"] = model.text_encoder.record
    with files.new_folder(workdir, "--to") as partial:
        checkpoints = Checkpoints(partial)
        checkpoints.save(0, state, {}, meta)
        checkpoints.close()
        files.write_json(os.path.join(partial, "config.json"), config)
