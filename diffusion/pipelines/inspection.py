"""Describes the examples of a data source as training receives them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from diffusion.core.arrays import scaled
from diffusion.core.progress import Progress
from diffusion.core.types import InputError, Source, Spec

BARS, ASCII_BARS = " ▁▂▃▄▅▆▇█", " .:-=+*#@"


def describe(source: Source) -> str:
    """Returns in one line how many examples a source has, and their shape, classes, captions and range of values."""
    spec = source.spec
    others = " and other sizes" if hasattr(source, "buckets") else ""
    parts = [
        f"{len(source):,} examples of {' x '.join(map(str, spec.shape))}{others}",
        f"{spec.num_classes} classes" if spec.num_classes else "no classes",
        *(f"{condition.kind} {name}" for name, condition in spec.conditions.items() if name != "label"),
        "captions" if spec.captions else "no captions",
        f"raw values {spec.x.low:g} to {spec.x.high:g}",
    ]
    ignored = getattr(getattr(source, "index", None), "ignored", None)
    if ignored:
        kinds = ", ".join(f"{count} {kind or 'without extension'}" for kind, count in ignored.items())
        parts.append(f"ignored files: {kinds}")
    return ", ".join(parts)


def buckets(source: Source, batch_size: int) -> list[str]:
    """Returns a line for each size that examples of a source have, the most frequent first: the height and the width,
    and the numbers of images and of batches per epoch. Empty if all examples have one size."""
    if not hasattr(source, "buckets"):
        return []
    _, firsts, counts = np.unique(source.buckets, return_index=True, return_counts=True)
    lines = []
    for position in np.argsort(-counts, kind="stable"):
        height, width = source[int(firsts[position])]["x"].shape[:2]
        count = int(counts[position])
        lines.append(f"{height} x {width}: {count:,} images, {count / batch_size:,.1f} batches")
    return lines


def unreadable_examples(source: Source) -> Iterator[str | None]:
    """Reads all examples and yields, for each that cannot be used, the reason, or None if the source skips it."""
    progress, count = Progress("read", len(source)), 0
    try:
        for index in range(len(source)):
            try:
                example = source[index]
                problem = None if np.isfinite(example["x"]).all() else f"example {index} is not finite"
                is_bad = problem is not None or example.get("skipped", False)
            except Exception as error:  # a source from elsewhere may raise anything
                known = isinstance(error, InputError)
                problem = error.problem if known else f"example {index}: {type(error).__name__}: {error}"
                is_bad = True
            if is_bad:
                count += 1
                yield problem
            progress.update(index + 1, bad=count)
    finally:
        progress.close()


def examples_of(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields the examples of a stream of batches, with x in [-1, 1]."""
    for batch in batches:
        batch = {**batch, "x": scaled(batch["x"])}
        for index in range(len(batch["x"])):
            yield jax.tree.map(lambda leaf, index=index: leaf[index], batch)


def histogram(values: np.ndarray, bins: int = 20, encoding: str | None = "utf-8") -> str:
    """Returns a line with the histogram of values, their range, mean and standard deviation.

    Its bars are block characters if the encoding has them.
    """
    try:
        levels = BARS.encode(encoding or "ascii") and BARS
    except UnicodeEncodeError:
        levels = ASCII_BARS
    counts, edges = np.histogram(values, bins)
    bars = "".join(levels[int(np.ceil(count / counts.max() * (len(levels) - 1)))] for count in counts)
    return (f"{edges[0]:+.2f} {bars} {edges[-1]:+.2f}  mean {values.mean():+.3f}, "
            f"standard deviation {values.std():.3f}")  # fmt: skip


def caption_of(example: Mapping[str, Any], spec: Spec) -> str:
    """Returns the caption of an example, or else the name or number of its class, or an empty text."""
    if "caption" in example:
        return str(example["caption"])
    if "label" not in example["cond"]:
        return ""
    label = int(example["cond"]["label"])
    return spec.class_names[label] if spec.class_names else str(label)
