"""What sampling takes from the data: labels and other conditions, and the moments where noise alone is no start."""

import difflib
import logging
import unicodedata
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core import checks
from diffusion.core.arrays import scaled
from diffusion.core.types import (
    NULL,
    Array,
    Autoencoder,
    Cond,
    InputError,
    Label,
    Schedule,
    Source,
    Spec,
    TextEncoder,
)
from diffusion.data import captions, size_conditions
from diffusion.data.pipeline import is_encoded
from diffusion.objectives.base.gaussian import MOST_TERMINAL_SNR, terminal_snr

MEASURED = 512  # examples from which the moments of the data are estimated

logger = logging.getLogger(__name__)


def conditions_of(
    spec: Spec, num: int, source: Callable[[], Source], labels: Sequence[Label] | None = None, cond: Cond | None = None,
    *, text_encoder: TextEncoder | None = None, prompts: Sequence[str] | str | None = None,
    negative_prompt: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Returns the conditions of `num` samples, `[num, ...]` each.

    Args:
      spec: What the samples look like.
      num: Number of samples.
      source: Returns the data, from whose examples, in turn, come the conditions that are not given. Those on the
        size of images are instead those of whole images of the size of the samples; see `data.size_conditions`.
      labels: Classes, numbers or names, repeated in turn; all classes by default.
      cond: Other conditions by name, arrays or a `Text` with any number of values, repeated in turn. `null` holds those
        of the unconditional half of guidance, where they differ.
      text_encoder: That of the model, if it reads text.
      prompts: Texts, repeated in turn; the captions of the first examples by default. They are the condition `prompt`
        of the result, and their tokens `text`.
      negative_prompt: The text that guidance moves away from, in place of that of a dropped one.

    Raises:
      InputError: The data has no such class or condition, or the model does not read text.
    """
    given = dict(cond or {})
    if spec.is_image:
        sizes = size_conditions.of_samples(spec.conditions, spec.shape[:2])
        if size_conditions.TIME_IDS in given:
            sizes.pop(NULL, None)
        given = {**sizes, **given}
    nulls = dict(given.pop(NULL, {}))
    if text_encoder is None and (prompts is not None or negative_prompt is not None):
        problem = "the model reads no text; leave it out" + (", or use labels" if spec.num_classes else "")
        raise InputError("negative_prompt" if prompts is None else "prompts", problem)
    texts = {}
    if text_encoder is not None and "text" in given:
        texts["text"] = _in_turn(given.pop("text"), num)
    elif text_encoder is not None:
        texts = _texts(text_encoder, num, source, [prompts] if isinstance(prompts, str) else prompts)
    for name in (*given, *nulls):
        if name not in spec.conditions or name == "label":
            known = ", ".join(spec.conditions.keys() - {"label"}) or "there are none; use labels"
            raise InputError("cond", f"the model has no condition {name!r} in addition to labels; one of: {known}")
    missing = spec.conditions.keys() - {"label", *given}
    found = examples_of(source(), missing, num) if missing else {}
    found |= texts | _in_turn(given, num)
    if negative_prompt is not None:
        nulls["text"] = text_encoder.tokenize([negative_prompt])
    if nulls:
        found[NULL] = _in_turn(nulls, num)
    labels = labels_for(spec.num_classes, num, numbers_of(labels, spec.class_names))
    return found if labels is None else {**found, "label": labels}


def _texts(
    encoder: TextEncoder, num: int, source: Callable[[], Source], prompts: Sequence[str] | None
) -> dict[str, Any]:
    """Returns `prompt`, texts `[num]`, and `text`, their tokens."""
    if prompts is None:
        data = source()
        caption = captions.of_source(data)
        prompts = [caption(index) for index in range(min(num, len(data)))]
    if not len(prompts):
        raise InputError("prompts", "holds no prompt; leave it out for the captions of the data")
    if len(prompts) > num:
        raise InputError("prompts", f"must be at most one per sample, got {len(prompts)} for {num} samples")
    texts = np.array([prompts[index % len(prompts)] for index in range(num)], object)
    return {"prompt": texts, "text": _in_turn(encoder.tokenize(list(prompts)), num)}


def examples_of(source: Source, names: Collection[str], num: int) -> dict[str, Any]:
    """Returns the named conditions of a source's first `num` examples, `[num, ...]` each, in turn if it has fewer."""
    each = [source[index]["cond"] for index in range(min(num, len(source)))]
    found = jax.tree.map(lambda *values: np.stack(values), *({name: cond[name] for name in names} for cond in each))
    return _in_turn(found, num)


def moments_of(
    schedule: Schedule, source: Callable[[], Source], autoencoder: Autoencoder | None,
    shape: tuple[int, ...] | None = None,
) -> Any:  # fmt: skip
    """Returns the mean and the variance of what the network models, for `loop.prior`.

    With a `shape` other than that of the data, they are those of all positions, `[channels]`. They are estimated from
    `MEASURED` examples of the data; None if the schedule ends in noise, so that samples start from noise. Data that
    cannot be read count as having mean 0 and variance 1.
    """
    if terminal_snr(schedule) <= MOST_TERMINAL_SNR:
        return None
    try:
        data = source()
        rows = np.unique(np.linspace(0, len(data) - 1, MEASURED).astype(int))
        x = jnp.stack([scaled(data[int(row)]["x"]) for row in rows])
    except InputError as error:
        logger.warning("samples start from noise of mean 0 and variance 1, since the data cannot be read: %s", error)
        return jnp.float32(0), jnp.float32(1)
    x = modelled(x, data, autoencoder)
    axes = 0 if shape in (None, x.shape[1:]) else tuple(range(x.ndim - 1))
    return jnp.mean(x, axis=axes), jnp.var(x, axis=axes)


def modelled(x: Array, source: Source, autoencoder: Autoencoder | None) -> Array:
    """Returns what the network models of examples x `[B, ...]` of a source: with an autoencoder, the most probable
    latents."""
    if autoencoder is None:
        return x
    return autoencoder.sample(x if is_encoded(source) else autoencoder.posterior(autoencoder.params, x), None)


def numbers_of(labels: Sequence[Label] | Label | None, class_names: Sequence[str]) -> Sequence[int] | None:
    """Returns one or more classes as numbers; those that are given as texts are names.

    Raises:
      InputError: There is no class of a name.
    """
    if labels is None:
        return None
    numbers = {name: number for number, name in enumerate(class_names)}

    def number_of(label: Label) -> int:
        if not isinstance(label, str):
            return label
        name = unicodedata.normalize("NFC", label)
        if not numbers:
            raise InputError("labels", f"must be numbers, as the run stores no names of its classes; got {label!r}")
        if name not in numbers:
            near = difflib.get_close_matches(name, numbers, n=1)
            known = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(list(numbers)[:20])}"
            raise InputError("labels", f"there is no class {label!r}; {known}")
        return numbers[name]

    return [number_of(label) for label in ([labels] if np.ndim(labels) == 0 else labels)]


def labels_for(num_classes: int, num: int, labels: Sequence[int] | None) -> np.ndarray | None:
    """Returns the label of each of `num` samples, int32 `[num]`; None where the data has no classes.

    Args:
      labels: At most `num` classes, repeated in turn; all classes if None.

    Raises:
      InputError: The data has no classes, or no such class, or there are too many labels.
    """
    if not num_classes:
        if labels is not None and len(labels):
            raise InputError("labels", "the run's data has no classes; leave them out")
        return None
    if labels is None:
        return np.arange(num, dtype=np.int32) % num_classes
    checks.labels(labels, num_classes, "labels")
    if len(labels) > num:
        raise InputError("labels", f"must be at most one per sample, got {len(labels)} for {num} samples")
    return np.resize(np.asarray(labels, np.int32), num)


def _in_turn(values: Any, num: int) -> Any:
    """Repeats the rows of arrays `[n, ...]` in turn up to `num`."""
    return jax.tree.map(lambda value: np.take(value, np.arange(num) % len(value), axis=0), values)
