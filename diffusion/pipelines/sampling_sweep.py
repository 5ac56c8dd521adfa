"""Samples one checkpoint with every combination of several settings; writes a labelled contact sheet and a table.

python -m experiments.sample --workdir=runs/digits --sweep="steps=10,20,50;guidance=1,2,4"
python -m experiments.sample --workdir=runs/digits --sweep=@points.json  # [{"sampler": "ddim", "steps": 10}, ...]
"""

import contextlib
import csv
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusion.core import files, images
from diffusion.core.types import Cond, InputError, SampleMetric
from diffusion.pipelines.evaluation import Drawn, check_finite, measure_samples
from diffusion.pipelines.generator import Generator, is_neutral, structure
from diffusion.pipelines.overrides import AXES, sections
from diffusion.pipelines.run import Run

SHOWN = 16  # samples per row of the contact sheet

logger = logging.getLogger(__name__)


def axes(text: str) -> dict[str, list[str]]:
    """Parses axes: `"steps=10,20;guidance=1,2"` -> `{"steps": ["10", "20"], "guidance": ["1", "2"]}`."""
    found = {}
    for axis in filter(None, text.split(";")):
        name, _, values = axis.partition("=")
        name, values = name.strip(), [value.strip() for value in _split(values)]
        if name not in AXES or name in found:
            problem = f"must be NAME=value,value;..., each NAME once and one of {', '.join(AXES)}; got {axis!r}"
            raise InputError("--sweep", problem)
        if not all(values):
            raise InputError("--sweep", f"{name} has an empty value")
        found[name] = values
    if not found:
        raise InputError("--sweep", 'is empty; use for example "steps=10,20,50;guidance=1,2,4"')
    if {"steps", "evaluations"} <= found.keys():
        raise InputError("--sweep", "evaluations determine the steps; give only one of the two")
    return found


def _split(text: str) -> list[str]:
    """Splits a text at the commas that are not inside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def points(text: str) -> list[dict[str, str]]:
    """Returns every combination of the axes, the last axis varying fastest; for `@FILE`, the combinations in a file."""
    if text.startswith("@"):
        return _read_points(os.path.expanduser(text[1:]))
    found = axes(text)
    return [dict(zip(found, values, strict=True)) for values in itertools.product(*found.values())]


def _read_points(path: str) -> list[dict[str, str]]:
    try:
        with open(path, encoding="utf-8") as file:
            listed = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError("--sweep", f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(listed, list) or not listed:
        raise InputError("--sweep", f'{path} must be a list, as in [{{"sampler": "ddim", "steps": 10}}]')
    for point in listed:
        unknown = [name for name in point if name not in AXES] if isinstance(point, dict) else [point]
        if unknown or not point:
            raise InputError("--sweep", f"{path}: unknown setting {unknown or point!r}; one of: {', '.join(AXES)}")
        if {"steps", "evaluations"} <= point.keys():
            raise InputError("--sweep", f"at {spell(point)}: evaluations determine the steps; give only one of the two")
    return [{name: str(value) for name, value in point.items()} for point in listed]


def make_generators(
    run: Run, chosen: Mapping[str, str], combinations: Sequence[Mapping[str, str]]
) -> list[Generator]:  # fmt: skip
    """Returns a generator per combination.

    Combinations that differ only in their times or in the numbers of the guidance share compiled programs: there is one
    per number of steps. All generators are built, and invalid combinations refused, before any sample is drawn.
    """
    generators, shared = [], {}
    requested = []
    for point in combinations:
        with _name_in_errors(point):
            sampler, guidance = sections(run.config, {**chosen, **point})
            compiled_in = repr(({key: value for key, value in sampler.items() if key not in ("steps", "grid")},
                                structure(guidance)))  # fmt: skip
            requested.append((point, sampler, guidance, compiled_in))
    guided = {compiled_in for _, _, guidance, compiled_in in requested if not is_neutral(guidance)}
    for point, sampler, guidance, compiled_in in requested:
        with _name_in_errors(point):
            if compiled_in in shared:
                generators.append(shared[compiled_in].with_settings(sampler=sampler, guidance=guidance))
            else:
                always_guided = compiled_in in guided
                generators.append(run.generator(sampler=sampler, guidance=guidance, always_guided=always_guided))
                shared[compiled_in] = generators[-1]
    return generators


@contextlib.contextmanager
def _name_in_errors(point: Mapping[str, str]) -> Iterator[None]:
    """Adds the combination to the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError("--sweep", f"at {spell(point)}: {error}") from None


def spell(point: Mapping[str, str]) -> str:
    """Returns a combination as text: `steps=10 guidance=2`."""
    return " ".join(f"{name}={value}" for name, value in point.items())


def sweep(
    run: Run,
    chosen: Mapping[str, str],
    text: str,
    out: str,
    *,
    cond: Cond,
    num: int,
    seed: int,
    batch_size: int,
    metrics: Sequence[SampleMetric] = (),
) -> None:
    """Samples all combinations and writes `sweep.csv`, `sweep.png` and a picture of each, `sweep/0001.png`.

    Args:
      run: The trained model.
      chosen: Settings that all combinations share; see `overrides.sections`.
      text: The combinations; see `points`.
      out: The folder that the files are written to.
      cond: The conditions of the samples; see `Run.conditions`.
      num: Samples per combination.
      seed: Seed of the noise.
      batch_size: Samples per batch.
      metrics: Metrics that add columns to the table; their values are NaN if some samples are not finite. The column
        `seconds` includes the compilation of those combinations whose column `compiled` is positive.
    """
    combinations = points(text)
    generators = make_generators(run, chosen, combinations)
    pictures = files.make_folder(os.path.join(out, "sweep"), "--out")
    rows, shown, bad = [], [], []
    for point, generator in zip(combinations, generators, strict=True):
        before = generator.compilations
        samples = generator.batches(run.params, cond, num, seed=seed, batch_size=batch_size, title=spell(point))
        drawn = Drawn(samples, SHOWN)
        values, problem = measure_samples(metrics, drawn, run.spec)
        steps = len(generator.times) - 1
        row = {**point, "steps": steps, "evaluations": generator.evaluations}
        row |= {"seconds": round(drawn.seconds, 3), "compiled": generator.compilations - before}
        for found in values:
            row |= found
        if problem:
            logger.warning("%s: %s", spell(point), problem)
            bad.append(spell(point))
        figures = "  ".join(f"{name} {value:.4f}" for found in values for name, value in found.items())
        logger.info("%s:  %s", spell(point), figures or f"{row['seconds']} s")
        rows.append(row)
        shown.append(drawn.x)
        images.save_png(images.picture(drawn.x), os.path.join(pictures, f"{len(rows):04d}.png"))
        write_table(os.path.join(out, "sweep.csv"), rows)  # after each combination, in case the sweep is interrupted
    # The sheet's labels leave out the settings that all combinations share.
    names = list(dict.fromkeys(name for point in combinations for name in point))
    varying = [name for name in names if len({point.get(name) for point in combinations}) > 1] or names
    labels = [spell({name: point[name] for name in varying if name in point}) for point in combinations]
    sheet = os.path.join(out, "sweep.png")
    images.save_png(images.labelled(shown, labels), sheet)
    logger.info("%d combinations of %d samples: %s and %s", len(rows), num, sheet, os.path.join(out, "sweep.csv"))
    check_finite(bad, len(rows), "combinations")


def write_table(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows as CSV, with the columns of all rows."""
    with files.replace(path) as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
