"""Builds everything that a training needs from a config, before anything is computed or written."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from diffusion.core import images
from diffusion.core.build import build, call
from diffusion.core.types import InputError, Params, Source, Spec, TextEncoder
from diffusion.data import captions
from diffusion.data.pipeline import check_encoder, check_position, decoded_spec, is_encoded
from diffusion.distributed.mesh import make_mesh
from diffusion.pipelines import autoencoder_training, warm_start
from diffusion.pipelines.conditions import conditions_of, moments_of
from diffusion.pipelines.config import check_config, external_names, sharding_options
from diffusion.pipelines.evaluation import Evaluation, build_metrics, check_metrics, evaluated_conditions, not_finite
from diffusion.pipelines.generator import Generator
from diffusion.pipelines.model import Model, model_of
from diffusion.pipelines.run import open_run, open_source
from diffusion.training import hooks
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.options import CheckpointOptions, Options
from diffusion.training.program import Program, make_program
from diffusion.training.resilience.guards import Guard
from diffusion.training.state import initial_params, trainable
from diffusion.training.trainer import Trainer, check_keep_best, check_same, check_steps, check_trained

PREVIEW_SEED, PREVIEW_ROWS, PREVIEW_COLUMNS, PREVIEW_POINTS = 0, 8, 10, 5000

logger = logging.getLogger(__name__)


def build_training(config: Mapping[str, Any], workdir: str) -> dict[str, Any]:
    """Returns the keyword arguments of `training.trainer.Trainer` for a resolved config.

    Raises:
      InputError: Parts of the config are invalid or do not fit together, or the workdir has another run.
    """
    check_config(config)
    checkpoints = Checkpoints(workdir, read_only=True)
    check_trained(checkpoints.newest_valid(checkpoints.meta)[1] or {})  # before the data, which may take long to make
    source = build("data", config["data"], field="data")
    spec = decoded_spec(source)
    if config["autoencoder"] is None:
        check_encoder(source, None)  # before a network for images of that size is built
    meta, teacher = meta_of(config, spec, workdir)
    if config["text_encoder"] is None:
        captions.with_text(source, None)
    model = model_of(meta, source=source)
    check_encoder(source, model.autoencoder)
    source = captions.with_text(source, model.text_encoder)
    keywords = training(config)
    options = keywords["options"]
    start = start_of(config, meta, model, teacher, keywords["mesh"])
    if hasattr(model.objective, "reconstruct"):
        autoencoder_training.check(model, options)
        draw = autoencoder_training.preview(model, keywords["mesh"], source)
    else:
        generator = Generator(
            model.network, model.objective, spec, keywords["mesh"], autoencoder=model.autoencoder,
            text_encoder=model.text_encoder, sampler=config["sampler"], guidance=config["guidance"],
            cond_drop_rate=options.unconditional_share(model.spec(spec).conditions),
            moments=moments_of(model.objective.schedule, lambda: source, model.autoencoder),
        )  # fmt: skip
        draw = lambda params: preview(generator, params, source, model.text_encoder)  # noqa: E731
    found = [hooks.preview(options.preview_every, draw)] if options.preview_every else []
    if config["eval"]["every"]:
        found.append(evaluation_hook(config, source, spec, model, keywords))
    else:
        check_metrics(config, source, model)
    return {
        **keywords, **model._asdict(), "source": source, "meta": meta, "teacher": teacher, "start": start,
        "hooks": found,
    }  # fmt: skip


def evaluation_hook(
    config: Mapping[str, Any], source: Source, spec: Spec, model: Model, keywords: Mapping[str, Any]
) -> hooks.Hook:
    """Returns the hook that computes the metrics of the `eval` section during training, as `experiments.evaluate` does.

    Args:
      source: The training data.
      spec: What the samples look like.
      model: The model.
      keywords: As `training` returns them.

    Raises:
      InputError: The model does not support a metric, or `checkpoint.keep_best` names a metric that is never measured
        at the step of a checkpoint.
    """
    section, checkpoint = config["eval"], keywords["checkpoint"]

    def generator(scale: float) -> Generator:
        moments = moments_of(model.objective.schedule, lambda: source, model.autoencoder)
        return Generator(
            model.network, model.objective, spec, keywords["mesh"], sampler=config["sampler"],
            guidance={**config["guidance"], "scale": scale}, autoencoder=model.autoencoder,
            text_encoder=model.text_encoder, moments=moments,
            cond_drop_rate=keywords["options"].unconditional_share(model.spec(spec).conditions),
        )  # fmt: skip

    metrics = list(build_metrics(config, source, model).values())

    evaluation = Evaluation(metrics, generator, model, spec, evaluated_conditions(config, spec, source, model))

    def measure(params: Params) -> dict[str, float]:
        results = {}
        for values, note in evaluation(params, batch_size=section["batch_size"]):
            results |= values
            if not all(map(math.isfinite, values.values())):
                logger.warning("%s: not finite %s", ", ".join(values), note)
        return results

    hook = hooks.evaluate(section["every"], measure, evaluation.names)
    both = section["every"], checkpoint.every
    if checkpoint.keep_best in hook.metrics and max(both) % min(both):
        problem = f"is {both[0]}, and checkpoint.every {both[1]}; one must be a multiple of the other for keep_best"
        raise InputError("eval.every", problem)
    return hook


def check_training(keywords: Mapping[str, Any], workdir: str) -> str:
    """Traces a whole train step and returns a line that says what would be trained.

    Nothing is compiled or computed, and no array of the model is allocated or read.

    Args:
      keywords: As `build_training` returns them.
      workdir: The run's folder.

    Raises:
      InputError: The step cannot be traced, the mesh does not fit, `checkpoint.keep_best` names no metric, or the
        workdir has a run that cannot resume so.
    """
    trainer = Trainer(**keywords)  # for the checks that it makes itself
    source, options, mesh = keywords["source"], keywords["options"], keywords["mesh"]
    model = Model(**{name: keywords[name] for name in Model._fields})
    others = {*Model._fields, "source", "meta", "hooks", "start"}
    given = {name: keywords[name] for name in keywords.keys() - others}
    program = program_of(model, encoded=is_encoded(source), text_encoded=captions.is_text_encoded(source), **given)
    program.check_frozen(keywords["start"])
    program.trace(source, options.batch_size)
    checkpoints = Checkpoints(workdir, read_only=True)
    step, position, _ = checkpoints.newest_valid(lambda step: checkpoints.check_fits(step, program.state))
    if step is not None:
        check_same(checkpoints.meta(step), trainer.meta)
    checkpoints.close()
    check_steps(step or 0, options.steps, workdir)
    if position:
        check_position(source, position, options.batch_size)
    check_keep_best(keywords["checkpoint"], keywords["hooks"], program, source, options.batch_size)
    count, *encoders = (
        sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
        for tree in (program.state.params, program.frozen.get("autoencoder"), program.frozen.get("text_encoder"))
    )
    found = zip(("an autoencoder", "a text encoder"), encoders, strict=True)
    named = " and ".join(f"{name} of {size:,}" for name, size in found if size)
    encoded = f", encoded in the step by {named} parameters" if named else ""
    devices = f"{mesh.size} device{'s' if mesh.size > 1 else ''}"
    return (f"{count:,} parameters on {devices}, {options.steps:,} steps of {options.batch_size:,} of the "
            f"{len(source):,} examples{encoded}")  # fmt: skip


def preview(
    generator: Generator, params: Params, source: Source, text_encoder: TextEncoder | None = None
) -> Image.Image:
    """Draws a grid of samples with a fixed seed and the classes in columns, so that grids differ by training alone.

    Other conditions, and prompts, are those of the first examples.
    """
    spec = decoded_spec(source)
    num = PREVIEW_ROWS * PREVIEW_COLUMNS if len(spec.shape) == 3 else PREVIEW_POINTS
    labels = np.arange(num) % PREVIEW_COLUMNS % spec.num_classes if spec.num_classes else None
    cond = conditions_of(spec, num, lambda: source, labels, text_encoder=text_encoder)
    x = generator(params, cond, num, seed=PREVIEW_SEED, batch_size=num)
    bad = not_finite(x)
    if bad:
        logger.warning("%d of the %d samples of the preview are not finite", bad, num)
    return images.picture(x, PREVIEW_COLUMNS)


def meta_of(config: Mapping[str, Any], spec: Spec, workdir: str) -> tuple[dict[str, Any], Mapping[str, Params] | None]:
    """Returns what a run saves with its checkpoints, and the parameters of the teacher that its objective names.

    The parameters are None if there is no teacher, or if the run has started: then its checkpoint contains them.

    Raises:
      InputError: The teacher cannot be read, or the run has started with other data or another model.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    stored = checkpoints.newest_valid(checkpoints.meta)[1] or {}
    kept = {name: stored[name] for name in ("origin", "autoencoder", "text_encoder") if name in stored}
    meta = {"config": config, "spec": dataclasses.asdict(spec), **kept}
    if stored:
        check_same(stored, meta)
    where = config["objective"].get("teacher")
    if where is None:
        return meta, None
    if not isinstance(where, str):
        raise InputError("objective.teacher", f"must be the workdir of a trained model, got {where!r}")
    if "teacher" in stored:
        return {**meta, "teacher": stored["teacher"]}, None
    try:
        # The student's config imports these names as well. The student's program shards the parameters.
        run = open_run(where, allow_imports=external_names(config), mesh=make_mesh())
    except InputError as error:
        raise error.within("objective.teacher") from None
    if run.spec != spec:
        raise InputError("objective.teacher", f"{where} was trained on data of another kind: {run.spec}, not {spec}")
    return {**meta, "teacher": {**run.meta, "step": run.step, "ema": run.ema}}, run.params


def start_of(
    config: Mapping[str, Any], meta: dict[str, Any], model: Model, teacher: Mapping | None, mesh: Mesh
) -> dict[str, Params]:
    """Returns the arrays that `init_from` provides, on the mesh, and records in `meta` where they come from.

    A run that resumes needs those that it does not train, and no others.

    Raises:
      InputError: The run that `init_from` names cannot be read, or none of its arrays fits.
    """
    if config["init_from"] is None:
        return {}
    record, network = meta.get("origin"), model.network
    if record and config["train"]["trainable"] is None and network.trainable is None:
        return {}
    run, expression = open_source(config, record, mesh)
    params = jax.eval_shape(lambda: initial_params(model.objective, network, jax.random.key(0), teacher))
    found, missing = warm_start.matching(trainable(params, model.objective), run.params, expression, network.base)
    if not record:
        warm_start.report(config, run.config, found, missing)
        meta["origin"] = run.origin
    return found


def training(config: Mapping[str, Any], devices: Sequence[Any] | None = None) -> dict[str, Any]:
    """Returns those keyword arguments of `Trainer` that depend on neither the data nor the model.

    Args:
      devices: The devices of the mesh; all by default.
    """
    options = call(Options, config["train"], field="train")
    return {
        "options": options,
        "optimizer": call(make_optimizer, {**config["optimizer"], "steps": options.steps}, field="optimizer"),
        "ema": call(make_ema, config["ema"], field="ema"),
        "checkpoint": call(CheckpointOptions, config["checkpoint"], field="checkpoint"),
        "mesh": call(make_mesh, {"devices": devices, **config["mesh"]}, field="mesh"),
        **call(sharding_options, config["sharding"], field="sharding"),
        "seed": config["seed"],
    }


def program_of(
    model: Model, teacher: Mapping | None, *, encoded: bool, text_encoded: bool, options: Options, checkpoint: Any,
    **keywords: Any,
) -> Program:  # fmt: skip
    """Returns the program that `Trainer` would run, without computing anything.

    Args:
      model: The model.
      teacher: The parameters of its teacher, or their shapes.
      encoded, text_encoded: See `make_program`.
      options, checkpoint, keywords: As `training` returns them.
    """
    return make_program(
        **model._asdict(), teacher=teacher, batch_size=options.batch_size, cond_drop_rate=options.cond_drop_rate,
        accumulate=options.accumulate, guard=Guard(options.spike), trainable=options.trainable, encoded=encoded,
        text_encoded=text_encoded, **keywords,
    )  # fmt: skip
