"""Measures models with the metrics of a config's `eval` section. The samples are measured batch by batch."""

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusion.core import images
from diffusion.core.build import build, find
from diffusion.core.types import (
    Autoencoder,
    Cond,
    Denoiser,
    InputError,
    Metric,
    Params,
    SampleMetric,
    Schedule,
    Source,
    Spec,
)
from diffusion.data import captions
from diffusion.data.pipeline import check_encoder, is_encoded
from diffusion.pipelines.conditions import conditions_of
from diffusion.pipelines.generator import Generator
from diffusion.pipelines.model import Model
from diffusion.training.resilience.guards import Diverged

MOST_NAMED = 3  # measurements that an error names
Batches = Iterable[tuple[np.ndarray, Cond]]  # samples `[B, ...]` and their conditions


class Evaluation:
    """Measures the model of a run with its metrics. Further measurements, of other parameters, compile nothing.

    Args:
      metrics: The metrics.
      generator: Returns what draws samples with a guidance scale. All generators are made here, so that what the model
        does not support is reported before anything is drawn.
      model, spec: The model, and what its samples look like.
      conditions: Returns the conditions of a number of samples.
    """

    def __init__(
        self, metrics: Sequence[Metric], generator: Callable[[float], Generator],
        model: Model, spec: Spec, conditions: Callable[[int], Cond],
    ):  # fmt: skip
        def of_params(params: Params) -> tuple[Denoiser, Schedule]:
            return model.objective.denoiser(model.network.apply, params), model.objective.schedule_for(params)

        self.metrics, self.spec, self._model, self._conditions = metrics, spec, of_params, conditions
        self._network = model.network.apply
        scales = {metric.guidance for metric in metrics if metric.kind == "samples"}
        self._generators = {scale: generator(scale) for scale in scales}

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all values."""
        return tuple(name for metric in self.metrics for name in metric.names)

    def __call__(
        self, params: Params, *, seed: int = 1, batch_size: int = 250, progress: bool = False
    ) -> Iterator[tuple[dict[str, float], str]]:
        """Yields the values of each metric, and a note on what was measured.

        Metrics of the same number of samples at the same guidance scale share the samples. If some of these are not
        finite, the values are NaN, and the note says how many.
        """
        shared = {}
        for metric in self.metrics:
            if metric.kind == "model":
                yield dict(metric(self._model, params, jax.random.key(seed))), ""
                continue
            if metric.kind == "autoencoder":
                yield dict(metric(self._network, params["net"])), ""
                continue
            key = metric.guidance, metric.num
            if key not in shared:
                group = [m for m in self.metrics if m.kind == "samples" and (m.guidance, m.num) == key]
                batches = self._generators[metric.guidance].batches(
                    params, self._conditions(metric.num), metric.num, seed=seed, batch_size=batch_size,
                    title=f"sample with guidance {metric.guidance:g}" if progress else None,
                )  # fmt: skip
                values, problem = measure_samples(group, batches, self.spec)
                shared[key] = iter(values), f"({problem or f'{metric.num} samples, guidance {metric.guidance:g}'})"
            values, note = shared[key]
            yield next(values), note


def evaluated_conditions(
    config: Mapping[str, Any], spec: Spec, source: Source, model: Model
) -> Callable[[int], dict[str, Any]]:
    """Returns a function that returns the conditions of a number of samples to measure.

    Prompts are the captions of the held-out data, if these have any; other conditions are those of the training data.
    """

    def conditions(num: int) -> dict[str, Any]:
        prompts = None
        if model.text_encoder is not None:
            held_out = build("data", config["eval"]["data"], field="eval.data")
            if held_out.spec.captions or captions.is_text_encoded(held_out):
                caption = captions.of_source(held_out)
                prompts = [caption(index) for index in range(min(num, len(held_out)))]
        return conditions_of(spec, num, lambda: source, text_encoder=model.text_encoder, prompts=prompts)

    return conditions


def build_metrics(config: Mapping[str, Any], train: Source, model: Model | None = None) -> dict[str, Metric]:
    """Builds the metrics of a config's `eval` section, by name.

    Args:
      train: The training data.
      model: What is measured, or None. Its autoencoder decodes data that were encoded in advance, so that metrics see
        images.

    Raises:
      InputError: A metric is invalid or cannot measure the model: it measures the network itself, and the network
        models latents; or it is not of the kind that autoencoders in training have.
    """
    section, autoencoder = config["eval"], None if model is None else model.autoencoder
    held_out = build("data", section["data"], field="eval.data")
    for source, field in ((train, "data"), (held_out, "eval.data")):
        check_encoder(source, autoencoder, field)
    real = {"train": Decoded.of(train, autoencoder), "held_out": Decoded.of(held_out, autoencoder)}
    names = [source.spec.class_names for source in real.values()]
    if all(names) and names[0] != names[1]:
        other = ", ".join(sorted(set(names[0]) ^ set(names[1]))[:10]) or "the same ones in another order"
        problem = f"has other classes than the training data ({other}), so that its labels mean others"
        raise InputError("eval.data", f"{problem}; give it the same directories")
    metrics = {
        name: build("evaluation", {"name": name, **options}, field=f"eval.metrics.{name}", **real)
        for name, options in section["metrics"].items()
    }
    for name, metric in metrics.items():
        if model is not None:
            _check_kind(f"eval.metrics.{name}", metric.kind, model)
            if metric.kind == "autoencoder":
                metric.check(model.network.apply)
        if metric.kind == "model" and autoencoder is not None:
            problem = "measures the network on the data, and this network models the latents of an autoencoder"
            raise InputError(f"eval.metrics.{name}", f"{problem}; remove it")
    return metrics


def check_metrics(config: Mapping[str, Any], train: Source, model: Model) -> None:
    """Checks the metrics of a config's `eval` section as far as possible without the held-out data.

    The kind of a metric is that of the class that its `make` says it returns.

    Raises:
      InputError: A metric is not of the kind that the model has, or cannot measure its network.
    """
    for name, options in config["eval"]["metrics"].items():
        field = f"eval.metrics.{name}"
        kind = getattr(inspect.signature(find("evaluation", name, field=field)).return_annotation, "kind", None)
        if kind is not None:
            _check_kind(field, kind, model)
        if kind == "autoencoder":
            metric = build("evaluation", {"name": name, **options}, field=field, train=train, held_out=train)
            metric.check(model.network.apply)


def _check_kind(field: str, kind: str, model: Model) -> None:
    """Raises InputError if a metric is for autoencoders in training and the model is none, or the opposite."""
    if kind == "autoencoder":
        if not hasattr(model.objective, "reconstruct"):
            raise InputError(field, "measures an autoencoder in training, and the objective is another; remove it")
    elif hasattr(model.objective, "reconstruct"):
        problem = "measures samples or a denoiser, and the objective autoencoder has neither; use reconstruction"
        raise InputError(field, problem)


def measure_samples(
    metrics: Sequence[SampleMetric], batches: Batches, spec: Spec
) -> tuple[list[dict[str, float]], str]:
    """Returns the values of each metric for batches of samples; images are rounded to 8 bits first, as they are saved.

    Also returns "", or a text that says how many samples are not finite. Then all values are NaN, and the batches after
    the first such sample are not drawn.
    """
    states, seen = [metric.init() for metric in metrics], 0
    for x, cond in batches:
        seen += len(x)
        bad = not_finite(x)
        if bad:
            values = [dict.fromkeys(metric.names, np.nan) for metric in metrics]
            return values, f"{bad} of {seen} samples are not finite"
        if spec.is_image:
            x = images.from_uint8(images.to_uint8(x))
        states = [metric.update(state, x, cond) for metric, state in zip(metrics, states, strict=True)]
    return [dict(metric.result(state)) for metric, state in zip(metrics, states, strict=True)], ""


class Decoded:
    """A source that was encoded in advance, whose most probable latents are decoded one by one."""

    def __init__(self, source: Source, autoencoder: Autoencoder):
        self.source, self.spec = source, source.decoded_spec
        decode = lambda x: autoencoder.decode(autoencoder.params, autoencoder.sample(x[None], None))[0]  # noqa: E731
        self._decode = jax.jit(decode)

    @classmethod
    def of(cls, source: Source, autoencoder: Autoencoder | None) -> Source:
        """Returns the source, decoded if it was encoded in advance."""
        return cls(source, autoencoder) if is_encoded(source) else source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        return {**example, "x": np.asarray(self._decode(example["x"]))}


def not_finite(x: np.ndarray) -> int:
    """Returns how many of the samples `[B, ...]` have a value that is not finite."""
    return int((~np.isfinite(x).reshape(len(x), -1).all(axis=1)).sum())


def check_finite(bad: Sequence[str], count: int, what: str) -> None:
    """Raises Diverged if some of `count` measurements had samples that are not finite; `bad` names these."""
    if bad:
        problem = f"samples are not finite in {len(bad)} of {count} {what}: {'; '.join(bad[:MOST_NAMED])}"
        raise Diverged(problem + (" ..." if len(bad) > MOST_NAMED else ""))


class Drawn:
    """Passes batches through, keeps the first samples for a picture, and measures the time that drawing takes.

    Attributes:
      x: At most `num` samples, `[N, ...]`, of the batches so far.
      seconds: Time spent waiting for batches.
    """

    def __init__(self, batches: Batches, num: int):
        self.batches, self.num, self.seconds, self._kept = batches, num, 0.0, []

    def __iter__(self) -> Iterator[tuple[np.ndarray, Cond]]:
        since = time.perf_counter()
        for x, cond in self.batches:
            self.seconds += time.perf_counter() - since
            room = self.num - sum(map(len, self._kept))
            if room > 0:
                self._kept.append(x[:room])
            yield x, cond
            since = time.perf_counter()

    @property
    def x(self) -> np.ndarray:
        return np.concatenate(self._kept)
