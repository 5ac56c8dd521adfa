"""One checkpoint sampled in every combination of some choices: a labelled contact sheet and a table.

python -m experiments.sample --workdir=runs/digits --sweep="steps=10,20,50;guidance=1,2,4"
python -m experiments.sample --workdir=runs/digits --sweep=@points.json  # [{"sampler": "ddim", "steps": 10}, ...]
"""

import contextlib
import csv
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion.core import files, images
from diffusion.core.types import InputError, SampleMetric
from diffusion.pipelines.generator import Generator, is_plain, structure
from diffusion.pipelines.overrides import AXES, sections
from diffusion.pipelines.run import Run

SHOWN = 16  # samples in a row of the contact sheet


def axes(text: str) -> dict[str, list[str]]:
    """`"steps=10,20;guidance=1,2"` -> `{"steps": ["10", "20"], "guidance": ["1", "2"]}`."""
    found = {}
    for axis in filter(None, text.split(";")):
        name, _, values = axis.partition("=")
        name, values = name.strip(), [value.strip() for value in values.split(",")]
        if name not in AXES or name in found:
            raise InputError("--sweep", f"{axis!r}: wants NAME=value,value, each NAME once; one of: {', '.join(AXES)}")
        if not all(values):
            raise InputError("--sweep", f"{name} has an empty value")
        found[name] = values
    if not found:
        raise InputError("--sweep", 'is empty; as in "steps=10,20,50;guidance=1,2,4"')
    if {"steps", "evaluations"} <= found.keys():
        raise InputError("--sweep", "steps follow from evaluations; give one of the two")
    return found


def points(text: str) -> list[dict[str, str]]:
    """Every combination of the axes, the last one fastest; or those of a file, for `@FILE`."""
    if text.startswith("@"):
        return _listed(text[1:])
    found = axes(text)
    return [dict(zip(found, values, strict=True)) for values in itertools.product(*found.values())]


def _listed(path: str) -> list[dict[str, str]]:
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
            raise InputError("--sweep", f"{path}: no choice {unknown or point!r}; one of: {', '.join(AXES)}")
        if {"steps", "evaluations"} <= point.keys():
            raise InputError("--sweep", f"at {spell(point)}: steps follow from evaluations; give one of the two")
    return [{name: str(value) for name, value in point.items()} for point in listed]


def drawers(run: Run, chosen: Mapping[str, str], combinations: Sequence[Mapping[str, str]]) -> list[Generator]:
    """What draws each of the combinations. Those that differ in times or in numbers of guidance share what is compiled:
    it is compiled once for each number of steps. All are built, and so refused, before the first draws."""
    made, shared = [], {}
    wanted = []
    for point in combinations:
        with at(point):
            sampler, guidance = sections(run.config, {**chosen, **point})
            fixed = repr(({key: value for key, value in sampler.items() if key not in ("steps", "grid")},
                          structure(guidance)))  # fmt: skip
            wanted.append((point, sampler, guidance, fixed))
    guided = {fixed for _, _, guidance, fixed in wanted if not is_plain(guidance)}
    for point, sampler, guidance, fixed in wanted:
        with at(point):
            if fixed in shared:
                made.append(shared[fixed].with_settings(sampler=sampler, guidance=guidance))
            else:
                made.append(run.drawer(sampler=sampler, guidance=guidance, always_guided=fixed in guided))
                shared[fixed] = made[-1]
    return made


@contextlib.contextmanager
def at(point: Mapping[str, str]) -> Iterator[None]:
    """Says of an error which combination it is of."""
    try:
        yield
    except InputError as error:
        raise InputError("--sweep", f"at {spell(point)}: {error}") from None


def spell(point: Mapping[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in point.items())


def sweep(
    run: Run,
    chosen: Mapping[str, str],
    text: str,
    out: str,
    *,
    labels: np.ndarray | None,
    num: int,
    seed: int,
    batch_size: int,
    metrics: Sequence[SampleMetric] = (),
) -> None:
    """Draws all combinations and writes `sweep.csv`, `sweep.png` and a picture of each, `sweep/0001.png`, into the
    folder `out`. The seconds of a combination
    that was `compiled` are with the compiling."""
    combinations = points(text)
    made = drawers(run, chosen, combinations)
    pictures = files.make_folder(os.path.join(out, "sweep"), "--out")
    rows, shown = [], []
    for point, drawer in zip(combinations, made, strict=True):
        before, start = drawer.compilations, time.perf_counter()
        x = drawer(run.params, labels, num, seed=seed, batch_size=batch_size, title=spell(point))
        steps = len(drawer.times) - 1
        row = {**point, "steps": steps, "evaluations": drawer.solver.evaluations(steps)}
        row |= {"seconds": round(time.perf_counter() - start, 3), "compiled": drawer.compilations - before}
        for metric in metrics:
            row |= run.measured(metric, x, labels)
        rows.append(row)
        shown.append(x[:SHOWN])
        images.save_png(images.picture(x[:SHOWN]), os.path.join(pictures, f"{len(rows):04d}.png"))
        write_table(os.path.join(out, "sweep.csv"), rows)  # each time: what is drawn is kept, whatever comes
    # What all combinations share needs no label.
    names = list(dict.fromkeys(name for point in combinations for name in point))
    telling = [name for name in names if len({point.get(name) for point in combinations}) > 1] or names
    labels = [spell({name: point[name] for name in telling if name in point}) for point in combinations]
    sheet = os.path.join(out, "sweep.png")
    images.save_png(images.labelled(shown, labels), sheet)
    print(f"{len(rows)} combinations of {num} samples: {sheet} and {os.path.join(out, 'sweep.csv')}")


def write_table(path: str, rows: Sequence[Mapping[str, Any]]) -> None:
    with files.replace(path) as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
