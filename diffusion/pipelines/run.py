"""A trained model, read from its workdir or taken from a trainer."""

import copy
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from diffusion.core import files, trees
from diffusion.core.arrays import scaled
from diffusion.core.build import build, call
from diffusion.core.types import (
    MACHINE_OPTIONS,
    Array,
    Autoencoder,
    Cond,
    Denoiser,
    InputError,
    Label,
    Metric,
    Network,
    Objective,
    Params,
    Sampler,
    Source,
    Spec,
    TextEncoder,
)
from diffusion.data import captions
from diffusion.data.pipeline import check_encoder
from diffusion.distributed import sharding
from diffusion.distributed.mesh import make_mesh
from diffusion.encoders.pretrained_text import skipped
from diffusion.encoders.prompt_weights import Rule, weighted
from diffusion.pipelines import edit_inputs, warm_start, weight_reference
from diffusion.pipelines.conditions import conditions_of, examples_of, modelled, moments_of
from diffusion.pipelines.config import (
    GUIDANCE,
    cond_drop_rate,
    default_sampler,
    external_names,
    sharding_options,
)
from diffusion.pipelines.evaluation import Evaluation, build_metrics, evaluated_conditions
from diffusion.pipelines.generator import Generator, check_numbers, is_neutral, structure
from diffusion.pipelines.model import (
    Model,
    check_autoencoder,
    check_text_encoder,
    model_of,
    with_section,
)
from diffusion.pipelines.overrides import with_options
from diffusion.pipelines.sizes import resized
from diffusion.pipelines.stored import config_and_spec
from diffusion.process.posterior import x0_errors
from diffusion.sampling.editing.common import Editing, Known
from diffusion.sampling.loop import AfterStep, bind
from diffusion.training.checkpoint import REFERENCE, Checkpoints
from diffusion.training.ema import make_ema
from diffusion.training.resilience.guards import Diverged
from diffusion.training.state import averages, trainable
from diffusion.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Run:
    """A trained model.

    Attributes:
      config: The resolved config.
      spec: What the data look like.
      step: The step of the checkpoint.
      ema: Name of the average that `params` holds; None for the parameters that were trained.
      network, objective: The model.
      params: The dict of networks.
      mesh: The devices that hold the parameters.
      meta: What the checkpoint says of the run.
      source: The data, which are opened when they are first needed.
      autoencoder: The autoencoder whose latents the network models, or None. Samples are decoded.
      text_encoder: What encodes prompts, or None if the model reads no text.
      origin: What identifies the arrays, JSON-able: the step, the average, and a digest.
    """

    def __init__(
        self, *, config: Mapping[str, Any], spec: Spec, network: Network, objective: Objective, params: Params,
        mesh: Mesh, step: int = 0, ema: str | None = None, meta: Mapping[str, Any] | None = None,
        autoencoder: Autoencoder | None = None, text_encoder: TextEncoder | None = None, digest: str | None = None,
        source: Source | None = None,
    ):  # fmt: skip
        self.config, self.spec, self.network, self.objective = config, spec, network, objective
        self.params, self.mesh, self.step, self.ema, self.meta = params, mesh, step, ema, dict(meta or {})
        self.autoencoder, self.text_encoder = autoencoder, text_encoder
        self.origin = {"step": step, "ema": ema, "digest": digest}
        self._generators: dict[tuple, Generator] = {}
        self._methods: dict[str, Editing] = {}
        self._sized: dict[tuple[int, int], Run] = {}
        self._source = source

    @property
    def model(self) -> Model:
        """The network, the objective and the encoders."""
        return Model(self.network, self.objective, self.autoencoder, self.text_encoder)

    @property
    def source(self) -> Source:
        """The training data."""
        if self._source is None:
            self._source = build("data", self.config["data"], field="data")
            check_encoder(self._source, self.autoencoder)
            self._source = captions.with_text(self._source, self.text_encoder)
        return self._source

    def at_size(self, size: tuple[int, int]) -> "Run":
        """Returns the run with samples of another size, `(height, width)`; with an autoencoder, in pixels.

        Raises:
          InputError: The network does not take the size.
        """
        if size not in self._sized:
            run = copy.copy(self)
            run.spec, run.autoencoder = resized(self.spec, self.network, self.autoencoder, size)
            run._generators, run._sized = {}, {}
            self._sized[size] = run
        return self._sized[size]

    def sample(
        self,
        num: int | None = None,
        labels: Sequence[Label] | None = None,
        *,
        prompts: Sequence[str] | str | None = None,
        negative_prompt: str | None = None,
        prompt_weights: Rule | None = None,
        cond: Cond | None = None,
        size: tuple[int, int] | None = None,
        start: np.ndarray | None = None,
        strength: float = 0.8,
        after_step: AfterStep | None = None,
        sampler: str | Mapping[str, Any] | Callable[..., Sampler] | Sampler | None = None,
        steps: int | None = None,
        grid: str | Mapping[str, Any] | Callable[..., np.ndarray] | None = None,
        guidance: float | str | Mapping[str, Any] | Callable[..., Denoiser] | None = None,
        seed: int = 0,
        batch_size: int = 250,
        progress: bool = False,
    ) -> np.ndarray:
        """Draws samples. What is not given is taken from the run's config.

        Args:
          num: Number of samples; 16 by default, or that of `start`.
          labels, cond: The conditions; see `conditions`. Labels are numbers or, as texts, the names of classes.
          prompts: What the samples show, for a model that reads text; repeated in turn. By default the captions of the
            first examples of the data.
          negative_prompt: What guidance moves away from, in place of the text of a dropped caption.
          prompt_weights: The rule, `a1111` or `comfyui`, by which `(word:1.3)` weights words of prompts; see
            `encoders.prompt_weights`. None: brackets are text.
          size: Height and width of the samples, in pixels if there is an autoencoder; those of the data by default.
          start: Clean examples `[n, ...]` to vary (image-to-image; SDEdit, Meng et al. 2022, arXiv 2108.01073),
            repeated in turn up to `num`. Sampling starts from them with noise added instead of from pure noise.
          strength: How much of `start` is replaced: the share of the steps that runs, the last ones, in (0, 1].
          after_step: `after_step(x, x0, t, s, keys) -> x`, called after each step from t to s with x `[B, ...]`, the
            estimate x0 and a key per sample, which may change x; see `sampling.loop.sample`. It is traced: give the
            same function again to use what has been compiled.
          sampler, steps, grid: The solver, its number of steps, and the time grid.
          guidance: A scale, the name or section of another guidance, or a function of the denoiser.
          seed: Sample i depends on the seed and i alone.
          batch_size: Number of samples drawn at once; the samples do not depend on it.
          progress: Show a progress line.

        Returns:
          float32 `[num, ...]`; images are `[num, H, W, C]` with values around [-1, 1].

        Raises:
          InputError: An argument is invalid, or the model does not support it.
        """
        num = (16 if start is None else len(start)) if num is None else num
        batches = self.sample_batches(
            num, labels, prompts=prompts, negative_prompt=negative_prompt, prompt_weights=prompt_weights, cond=cond,
            size=size, start=start, strength=strength, after_step=after_step, sampler=sampler, steps=steps, grid=grid,
            guidance=guidance, seed=seed, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        return np.concatenate([x for x, _ in batches])

    def sample_batches(
        self, num: int, labels: Sequence[Label] | None = None, *, prompts: Sequence[str] | str | None = None,
        negative_prompt: str | None = None, prompt_weights: Rule | None = None,
        cond: Cond | None = None, size: tuple[int, int] | None = None, start: np.ndarray | None = None,
        strength: float = 0.8, after_step: AfterStep | None = None, editing: Editing | None = None,
        known: Known | None = None, seed: int = 0, batch_size: int = 250, progress: bool = False, **options: Any,
    ) -> Iterator[tuple[np.ndarray, Cond]]:  # fmt: skip
        """Returns an iterator that draws the samples of `sample` batch by batch, each with its conditions.

        Args:
          num, labels, prompts, negative_prompt, prompt_weights, cond, size, start, strength, after_step, seed,
            batch_size, progress: As for `sample`.
          editing, known: A method of editing, and what is known of the samples, `[num, ...]` each; see `edit`.
          **options: `sampler`, `steps`, `grid` and `guidance`, as for `sample`.
        """
        if start is not None and not np.size(start):
            raise InputError("start", "holds no examples; leave it out")
        check_numbers(seed=seed, num=num, batch_size=batch_size)
        start = None if start is None else np.take(np.asarray(start), np.arange(num), axis=0, mode="wrap")
        sampler, guidance = with_options(self.config, **options)
        if negative_prompt is not None and is_neutral(guidance):
            raise InputError("negative_prompt", "has no effect without guidance; set guidance, or leave it out")
        run = self if size is None else self.at_size(size)
        generator = run._generator(sampler, guidance, after_step, prompt_weights, editing)
        conditions = run.conditions(num, labels, cond, prompts, negative_prompt, prompt_weights)
        return generator.batches(
            self.params, conditions, num, seed=seed, batch_size=batch_size,
            title="sample" if progress else None, start=start, strength=strength, known=known,
        )  # fmt: skip

    def edit(
        self,
        image: np.ndarray,
        mask: np.ndarray | None = None,
        labels: Sequence[Label] | None = None,
        *,
        method: str | Mapping[str, Any] | None = None,
        strength: float | None = None,
        num: int | None = None,
        **options: Any,
    ) -> np.ndarray:
        """Draws samples that agree with images, or with parts of them.

        Args:
          image: `[n, ...]` in [-1, 1], or one image without the first axis; repeated in turn up to `num`. For `pigdm`,
            what was measured of an image.
          mask: `[n, H, W]` or `[H, W]` in [0, 1], 1 where the image is regenerated and 0 where it is kept.
          method: The name or section of a method; see `sampling.editing`. None: `replacement` with a mask, and
            image-to-image without, which starts from the image with noise (SDEdit, Meng et al. 2022, arXiv 2108.01073).
          strength: The share of the steps that run, the last ones, in [0, 1]: they start from the image with noise, and
            from 1 on, with a method, from pure noise. 0 returns the image. None: 1 with a method, and otherwise 0.8.
          num: Number of samples; that of the images if None.
          labels, **options: As for `sample`.

        Returns:
          float32 `[num, ...]`.

        Raises:
          InputError: An argument is invalid, or the model does not support it.
        """
        run = self if options.get("size") is None else self.at_size(options["size"])
        if method is None and mask is not None:
            method = "replacement"
        if method is not None and not hasattr(method, "hooks"):
            method = self._methods.setdefault(repr(method), build("editing", method, field="method"))
        shape = run.spec.shape if method is None else method.measured(run.spec.shape)
        image = edit_inputs.images(image, shape, num)
        if strength is not None and not 0 <= strength <= 1:
            raise InputError("strength", f"must be in [0, 1], got {strength}")
        known = None if method is None else edit_inputs.known(image, mask, method)
        if method is not None and method.keeps is None and run.autoencoder is not None:
            raise InputError(
                "method", "is for models of images, and this one models latents; use replacement or repaint"
            )
        if strength == 0:
            return image.copy()
        strength = (0.8 if method is None else 1.0) if strength is None else strength
        start = image if method is None or strength < 1 else None
        drawn = self.sample_batches(
            len(image), labels, editing=method, known=known, start=start, strength=strength, **options
        )
        return np.concatenate([x for x, _ in drawn])

    def conditions(
        self, num: int, labels: Sequence[Label] | None = None, cond: Cond | None = None,
        prompts: Sequence[str] | str | None = None, negative_prompt: str | None = None,
        prompt_weights: Rule | None = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Returns the conditions of `num` samples, `[num, ...]` each; see `conditions.conditions_of`.

        Args:
          prompt_weights: As for `sample`; a generator of these conditions needs the same.
        """
        return conditions_of(
            self.spec, num, lambda: self.source, labels, cond, text_encoder=self._reading(prompt_weights),
            prompts=prompts, negative_prompt=negative_prompt,
        )  # fmt: skip

    def evaluate(
        self, *, steps: int | None = None, seed: int = 1, batch_size: int = 250, progress: bool = False
    ) -> dict[str, float]:
        """Returns the metrics of the config's `eval` section, by name.

        Args:
          steps: Number of steps of the sampler; the config's by default.
          seed: Seed of the noise.
          batch_size: Number of samples drawn at once; the metrics do not depend on it.
          progress: Show progress lines.
        """
        measured = self.measure(
            *with_options(self.config, steps=steps), seed=seed, batch_size=batch_size, progress=progress
        )
        return {name: value for values, _ in measured for name, value in values.items()}

    def measure(
        self, sampler: Mapping[str, Any], guidance: Mapping[str, Any], *, seed: int = 1, batch_size: int = 250,
        progress: bool = False,
    ) -> Iterator[tuple[Mapping[str, float], str]]:  # fmt: skip
        """Yields the values of each metric of the config's `eval` section, and a note on what was measured.

        Args:
          sampler, guidance: Config sections; the scale of the guidance is the metric's own.

        Raises:
          Diverged: A value is not finite; the message says how many samples are not.
        """

        def generator(scale: float) -> Generator:
            return self.generator(sampler=sampler, guidance={**guidance, "scale": scale})

        conditions = evaluated_conditions(self.config, self.spec, self.source, self.model)
        evaluation = Evaluation(self.metrics(), generator, self.model, self.spec, conditions)
        for values, note in evaluation(self.params, seed=seed, batch_size=batch_size, progress=progress):
            for name, value in values.items():
                if not np.isfinite(value):
                    problem = f"{name} is {value} {note}".rstrip()
                    raise Diverged(f"{problem}; choose another checkpoint, average or sampler")
            yield values, note

    def denoiser(self, **cond: Any) -> Denoiser:
        """Returns `denoise(x, t) -> Denoised` for a condition, such as `label=jnp.array([3])`.

        Args:
          **cond: The conditions, `[B, ...]` each; none for data without conditions.
        """
        return bind(self.objective.denoiser(self.network.apply, self.params), cond)

    def generator(
        self, *, sampler: Mapping[str, Any], guidance: Mapping[str, Any], always_guided: bool = False,
        after_step: AfterStep | None = None, prompt_weights: Rule | None = None, editing: Editing | None = None,
    ) -> Generator:  # fmt: skip
        """Returns what draws from this model, after measuring or reading what the sections require.

        Args:
          sampler, guidance: Config sections.
          always_guided, after_step, editing: See `Generator`.
          prompt_weights: As for `sample`.
        """
        if (sampler.get("name"), sampler.get("variance")) == ("ancestral", "analytic") and not sampler.get("x0_errors"):
            sampler = {**sampler, "x0_errors": self._x0_errors()}
        worse = self._worse(guidance.get("worse")) if guidance.get("name") == "autoguidance" else None
        return Generator(
            self.network, self.objective, self.spec, self.mesh, sampler=sampler, guidance=guidance, worse=worse,
            cond_drop_rate=cond_drop_rate(self.config, self.model.spec(self.spec)), always_guided=always_guided,
            autoencoder=self.autoencoder, text_encoder=self._reading(prompt_weights), after_step=after_step,
            editing=editing, moments=moments_of(self.objective.schedule, lambda: self.source, self.autoencoder,
                               self.model.spec(self.spec).shape),
        )  # fmt: skip

    def metrics(self) -> list[Metric]:
        """Builds the metrics of the config's `eval` section."""
        if not self.config["eval"]["metrics"]:
            return []  # without opening the data
        return list(build_metrics(self.config, self.source, self.model).values())

    def _reading(self, rule: Rule | None) -> TextEncoder | None:
        """Returns the text encoder, which reads weights in prompts by a rule."""
        if rule is None:
            return self.text_encoder
        if self.text_encoder is None:
            raise InputError("prompt_weights", "the model reads no text; leave it out")
        return weighted(self.text_encoder, rule)

    def _generator(
        self, sampler: Mapping[str, Any], guidance: Mapping[str, Any], after_step: AfterStep | None,
        rule: Rule | None = None, editing: Editing | None = None,
    ) -> Generator:  # fmt: skip
        """Returns a generator that shares the compiled functions of earlier calls where possible."""
        fixed = {key: value for key, value in sampler.items() if key not in ("steps", "grid")}
        parts = sorted(fixed.items(), key=lambda item: item[0]), structure(guidance), is_neutral(guidance)
        key = repr(parts), after_step, rule, editing
        if key not in self._generators:
            self._generators[key] = self.generator(
                sampler=sampler, guidance=guidance, after_step=after_step, prompt_weights=rule, editing=editing
            )
            return self._generators[key]
        return self._generators[key].with_settings(sampler=sampler, guidance=guidance)

    def _worse(self, where: Any) -> tuple[Network, Objective, Params]:
        if not isinstance(where, Mapping):
            problem = "is missing: the other model, as {'workdir': ..., 'ema': ..., 'step': ...}"
            raise InputError("guidance.worse", problem)
        run = call(open_run, {**where, "mesh": self.mesh}, field="guidance.worse")
        if run.spec != self.spec:
            raise InputError("guidance.worse.workdir", f"was trained on data of another kind: {run.spec}")
        return run.network, run.objective, run.params

    def _x0_errors(self, num: int = 512, points: int = 50) -> tuple[tuple[float, float], ...]:
        """Measures the errors that the analytic variance needs, on the first examples of the run's data."""
        num = min(num, len(self.source))
        x0 = jnp.stack([scaled(self.source[index]["x"]) for index in range(num)])
        cond = jax.tree.map(jnp.asarray, examples_of(self.source, self.spec.conditions, num))
        x0 = modelled(x0, self.source, self.autoencoder)
        times = jnp.arange(1, points + 1) / points
        return x0_errors(self.denoiser(**cond), self.objective.schedule_for(self.params), x0, times, jax.random.key(0))


def open_run(
    workdir: str,
    ema: str | None = None,
    step: int | None = None,
    network: Network | Mapping[str, Any] | None = None,
    objective: Objective | None = None,
    allow_imports: bool | Collection[str] = False,
    start: Mapping[str, Params] | None = None,
    autoencoder: Autoencoder | str | Mapping[str, Any] | None = None,
    text_encoder: TextEncoder | str | Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    clip_skip: int | None = None,
) -> Run:
    """Reads a checkpoint of a workdir onto all devices.

    The parameters are sharded as in training, by the rules of the config's `sharding` section.

    A config may name parts of other packages, `"package.module:attribute"`, which are imported and called. As the
    config comes from a file, this must be allowed.

    Args:
      ema: Name of the average to read; that of `ema.sample_with` if None, the trained parameters if "none".
      step: Step of the checkpoint; the newest valid one if None.
      network, objective: For a run that was trained with objects instead of names. `network` may also be a section of
        the options of the network that change no parameter, such as `{"dtype": "bfloat16"}`, to use in place of the
        config's.
      allow_imports: Whether such parts may be imported, or the names of those that may be.
      start: The arrays that a run does not train, if they were given to the `Trainer` and not by `init_from`.
      autoencoder: The autoencoder, for a run that was trained with one as an object or whose files were moved: an
        object, or a section, `{"path": "models/moved"}`, which keeps the config's options that it leaves out.
      text_encoder: The text encoder, likewise.
      mesh: The devices. By default all, in the mesh of the run's config as far as it fits their number.
      clip_skip: How many of the last layers of CLIP prompts are read without, as in diffusers; see
        `encoders.pretrained_text.skipped`.

    Raises:
      InputError: The workdir does not hold such a checkpoint, or it cannot be read.
    """
    if isinstance(network, Mapping):
        for name in network.keys() - set(MACHINE_OPTIONS):
            problem = f"must be that of the training; only {', '.join(MACHINE_OPTIONS)} may differ"
            raise InputError(f"network.{name}", problem)
    workdir = os.path.expanduser(workdir)
    checkpoints = Checkpoints(workdir, read_only=True)
    there = checkpoints.steps()
    if not there:
        problem = "holds no checkpoint" if files.is_folder(workdir, "workdir") else "does not exist"
        raise InputError("workdir", f"{workdir} {problem}; train one: python -m experiments.train --workdir={workdir}")
    if step is not None and step not in there:
        raise InputError("step", f"{workdir} holds no checkpoint of step {step}; one of: {', '.join(map(str, there))}")

    def read(step: int) -> Run:
        meta = checkpoints.meta(step)
        if allow_imports is not True:
            imported = sorted(external_names(meta) - set(allow_imports or ()))
            if imported:
                problem = f"its config imports {', '.join(imported)}; if you trust it, pass allow_imports"
                raise InputError("workdir", problem)
        config, spec = config_and_spec(meta)
        reference = meta.get(REFERENCE)
        if reference:
            weight_reference.check(reference)
        encoders = {"autoencoder": autoencoder, "text_encoder": text_encoder}
        for part, encoder in encoders.items():
            if encoder is not None and config[part] is None and part not in meta:
                raise InputError(part, "is given, and the run was trained without one; leave it out")
            if isinstance(encoder, (str, Mapping)):
                meta, encoders[part] = with_section(meta, part, encoder), None
        if isinstance(network, Mapping):
            meta = with_section(meta, "network", network)
        config, spec = config_and_spec(meta)
        kept = call(make_ema, config["ema"], field="ema")
        name = ema or kept.main
        if name not in (*kept.names, "none"):
            raise InputError("ema", f"the run has no average {name!r}; one of: {', '.join(kept.names)}, none")
        name = None if name == "none" or reference else name
        if network and objective and not isinstance(network, Mapping):
            model = Model(network, objective, **encoders)
            check_autoencoder(meta, model.autoencoder)
            check_text_encoder(meta, model.text_encoder)
        else:
            model = model_of(meta, **encoders)
        if clip_skip is not None:
            model = model._replace(text_encoder=skipped(model.text_encoder, clip_skip))
        devices = _mesh(config["mesh"]) if mesh is None else mesh
        shapes = jax.eval_shape(lambda: model.objective.init(model.network, jax.random.key(0)))
        patterns = config["train"]["trainable"]
        patterns = model.network.trainable if patterns is None else patterns
        learned = _sharded(trainable(shapes, model.objective), name, devices, config["sharding"])
        fixed = {}
        if patterns is not None:
            learned, fixed = trees.split(learned, trees.matcher(patterns, "train.trainable"))
        if reference:
            params = {"net": weight_reference.read(reference, learned["net"])}
        else:
            params = restored(step, learned, model.objective, name)
        if fixed:
            params = trees.merge(params, fixed_params(config, meta, fixed, model.network.base, start, devices))
        return Run(
            config=config, spec=spec, **model._asdict(), params=params, mesh=devices, step=step, ema=name, meta=meta,
            digest=checkpoints.digest(step),
        )  # fmt: skip

    def restored(step: int, learned: Mapping[str, Params], objective: Objective, name: str | None) -> dict[str, Params]:
        """Reads the trained arrays, those of networks that are not averaged as they were trained."""
        averaged = averages(learned, objective) if name else {}
        others = {name: value for name, value in learned.items() if name not in averaged}
        params = checkpoints.restore_params(step, others, None) if others else {}
        return {**params, **(checkpoints.restore_params(step, averaged, name) if averaged else {})}

    run = checkpoints.newest_valid(read)[1] if step is None else read(step)
    checkpoints.close()
    return run


def open_source(config: Mapping[str, Any], record: Mapping[str, Any] | None, mesh: Mesh) -> tuple[Run, str]:
    """Reads the run that a config's `init_from` names.

    Args:
      config: The config.
      record: `Run.origin` from when the run started, to read the same arrays again; None for a run that starts.
      mesh: The devices that its arrays are read onto.

    Returns:
      The run, and the expression that selects its arrays; see `warm_start.parse`.

    Raises:
      InputError: The run cannot be read, or it holds other arrays than those of `record`.
    """
    workdir, ema, expression = warm_start.parse(config["init_from"])
    try:
        # The run that starts imports the same parts, if any.
        imports = external_names(config)
        run = open_run(workdir, ema, record["step"] if record else None, allow_imports=imports, mesh=mesh)
    except InputError as error:
        raise error.within("init_from") from None
    if record and record != run.origin:
        problem = f"holds other arrays at step {run.step} than those that the run started from; restore them"
        raise InputError("init_from", f"{workdir} {problem}")
    return run, expression


def fixed_params(
    config: Mapping[str, Any], meta: Mapping[str, Any], fixed: Mapping[str, Params], base: str | None,
    start: Mapping[str, Params] | None, mesh: Mesh,
) -> dict[str, Params]:  # fmt: skip
    """Returns the arrays that a run does not train, and therefore does not save.

    Args:
      config, meta: Of the run.
      fixed: The arrays, abstract, with the shardings that they will have.
      base: See `Network.base`.
      start: The arrays, if they were given to the trainer.
      mesh: The devices that they are read onto.

    Raises:
      InputError: They are nowhere, or are not those that the run started with.
    """
    expression = ""
    if start is None:
        if config["init_from"] is None:
            problem = "was trained from arrays that its checkpoints leave out; pass them: load(workdir, start=...)"
            raise InputError("workdir", problem)
        run, expression = open_source(config, meta.get("origin"), mesh)
        start = run.params
    found, missing = warm_start.matching(fixed, start, expression, base)
    for path, reason in missing.items():
        raise InputError("start", f"has no {path} ({reason}), which the run does not train")
    return jax.tree.map(lambda leaf, like: jax.device_put(leaf, like.sharding), found, dict(fixed))


def run_of(trainer: Trainer) -> Run:
    """Returns the model that a trainer has trained so far, with the average that sampling uses."""
    sampler = default_sampler(type(trainer.objective))
    config = {**trainer.meta["config"], "sampler": sampler, "guidance": GUIDANCE, "eval": {"metrics": {}}}
    params = jax.tree.map(jnp.copy, trainer.averaged_params())  # the next step donates the trainer's own
    return Run(
        config=config, spec=trainer.spec, network=trainer.network, objective=trainer.objective, params=params,
        mesh=trainer.mesh, step=trainer.step, ema=trainer.ema.main, meta=trainer.meta, source=trainer.source,
        autoencoder=trainer.autoencoder, text_encoder=trainer.text_encoder,
    )  # fmt: skip


def sample(
    model: Trainer | Run | str, num: int | None = None, labels: Sequence[Label] | None = None, **options: Any
) -> Array:
    """Draws samples from a trainer, a run or a workdir; see `Run.sample`."""
    run = open_run(model) if isinstance(model, str) else run_of(model) if isinstance(model, Trainer) else model
    return run.sample(num, labels, **options)


def _mesh(section: Mapping[str, Any]) -> Mesh:
    """Returns the mesh of a config's section over the devices of this machine, with smaller axes if there are fewer."""
    try:
        return call(make_mesh, section, field="mesh")
    except InputError as error:
        count = len(jax.devices())
        model = math.gcd(section.get("model", 1), count)
        mesh = make_mesh(fsdp=math.gcd(section.get("fsdp", 1), count // model), model=model)
        logger.warning("the mesh of the training does not fit here (%s); using %s", error, dict(mesh.shape))
        return mesh


def _sharded(learned: Mapping[str, Params], ema: str | None, mesh: Mesh, section: Mapping[str, Any]) -> Any:
    """Returns the abstract networks with the shardings that they or their average have in the train state."""
    options = call(sharding_options, section, field="sharding")
    state = {"params": dict(learned)} if ema is None else {"ema": {ema: dict(learned)}}
    shardings = sharding.of_state(state, mesh, options["rules"], options["fsdp_min_size"])
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)  # noqa: E731
    placed = jax.tree.map(place, state, shardings)
    return placed["params"] if ema is None else placed["ema"][ema]
