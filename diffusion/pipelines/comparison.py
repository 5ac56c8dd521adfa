"""Trained runs at the same numbers of evaluations, by one yardstick: what `experiments.compare` writes."""

import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image

from diffusion.core import files, images
from diffusion.core.checks import at_most
from diffusion.core.types import InputError, SampleMetric
from diffusion.pipelines import tables
from diffusion.pipelines.generator import MOST_STEPS, PLACING, Generator
from diffusion.pipelines.overrides import is_whole, sections
from diffusion.pipelines.run import Run, open_run
from diffusion.pipelines.sampling_sweep import write_table

SHOWN = 20  # samples in a row of the contact sheet
LOGARITHMIC = ("energy_distance_ratio",)  # figures whose axis is logarithmic
COLORS, MARKERS, LINES = 10, "osD^vPX", ("-", "--", ":")  # 10 and 7 have no common divisor: 70 runs look different


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run, and what draws from it at one number of evaluations with its config's `sampler` section."""

    name: str
    run: Run
    nfe: int
    sampler: Mapping[str, Any]
    drawer: Generator

    @property
    def label(self) -> str:
        return label(self.name, self.nfe)

    @property
    def settings(self) -> dict[str, Any]:
        """What a row of the table begins with."""
        solver = {key: value for key, value in self.sampler.items() if key not in PLACING}
        return {
            "run": self.name,
            "objective": self.run.config["objective"]["name"],
            "step": self.run.step,
            "ema": self.run.ema or "none",
            "sampler": spell(solver),
            "grid": spell(self.sampler.get("grid", "trailing")),
            "nfe": self.nfe,
            "steps": self.sampler["steps"],
        }


def label(name: str, nfe: int) -> str:
    return f"{name}, {nfe} evaluation{'s' if nfe > 1 else ''}"


def compare(
    workdirs: Sequence[str],
    nfe: Sequence[str],
    *,
    out: str,
    docs: str | None = None,
    num: int = 1000,
    seed: int = 1,
    batch_size: int = 250,
    ema: str | None = None,
) -> None:
    """Draws `num` samples of each run at each number of evaluations and measures them.

    Sample i starts from the same noise in every run, times its schedule's sigma, and has the same label. Nothing is
    drawn or written before all has been checked.

    Args:
      workdirs: of the runs.
      nfe: numbers of evaluations, as text. A sampler takes as many steps as they are enough for.
      out: folder for `compare.csv`, a row for each run and number of evaluations, which is written again after each;
        for `compare.png` and for `compare_samples.png`. The `seconds` of a row are with the compiling.
      docs: a file for the table (`experiments.tables`), with the two pictures beside it.
      ema: the average to take of all of them; each config's last if None, the raw parameters if "none".

    Raises:
      InputError: runs that are not there, are the same, or cannot be compared; bad numbers; no place to write to.
    """
    counts = whole_numbers(nfe)
    if docs:
        tables.around(docs, "--docs")
    runs = open_runs(workdirs, ema)
    metrics = yardstick(runs)
    cells = plan(runs, counts)
    files.make_folder(out, "--out")

    spec = cells[0].run.spec
    labels = np.arange(num, dtype=np.int32) % spec.num_classes if spec.num_classes else None
    rows, figures, shown = [], [], []
    for cell in cells:
        start = time.perf_counter()
        x = cell.drawer(cell.run.params, labels, num, seed=seed, batch_size=batch_size, title=cell.label)
        seconds = round(time.perf_counter() - start, 3)
        measured = [cell.run.measured(metric, x, labels) for metric in metrics]
        figures = [next(iter(values)) for values in measured]
        values = {name: value for values in measured for name, value in values.items()}
        rows.append({**cell.settings, **values, "seconds": seconds})
        write_table(os.path.join(out, "compare.csv"), rows)  # each time: what is drawn is kept, whatever comes
        print(f"{cell.label}:  {'  '.join(f'{name} {values[name]:.4f}' for name in figures)}")
        if len(runs) == 1 or all(cell.name != other.name for other, _ in shown):
            shown.append((cell, x[:SHOWN] if x.ndim == 4 else x))

    lines = drawn(plot(rows, figures))
    sheet = images.labelled([x for _, x in shown], [cell.label for cell, _ in shown])
    for stem in filter(None, (os.path.join(out, "compare"), docs and os.path.splitext(docs)[0])):
        images.save_png(lines, f"{stem}.png")
        images.save_png(sheet, f"{stem}_samples.png")
    if docs:
        tables.insert(docs, [table(rows, figures, list(runs), counts, num, seed)], "--docs")
    print(f"{len(rows)} times {num} samples: {out}{f' and {docs}' if docs else ''}")


def whole_numbers(texts: Sequence[str]) -> list[int]:
    """`["1", "8"]` -> `[1, 8]`."""
    for text in texts:
        if not is_whole(text) or int(text) < 1:
            raise InputError("--nfe", f"must be whole numbers of at least 1, as in 1,2,4,8,50; got {text!r}")
    counts = [at_most(MOST_STEPS, int(text), "--nfe") for text in texts]
    for count in counts:
        if counts.count(count) > 1:
            raise InputError("--nfe", f"has {count} more than once")
    if not counts:
        raise InputError("--nfe", "is empty; as in 1,2,4,8,50")
    return counts


def open_runs(workdirs: Sequence[str], ema: str | None = None) -> dict[str, Run]:
    """The runs by the names of their folders; by their paths, where two names are the same."""
    if not workdirs:
        raise InputError("--runs", "is empty; as in runs/digits,runs/digits_flow")
    runs, places = {}, [os.path.realpath(workdir) for workdir in workdirs]
    names = [os.path.basename(os.path.abspath(workdir)) for workdir in workdirs]
    for workdir, place, name in zip(workdirs, places, names, strict=True):
        if places.count(place) > 1:
            raise InputError("--runs", f"has {workdir} more than once")
        name = name if names.count(name) == 1 else workdir
        try:
            runs[name] = open_run(workdir, ema)
        except InputError as error:
            raise InputError("--runs", f"{name}: {error}") from None
    first, *_ = runs
    for name, run in runs.items():
        if run.spec != runs[first].spec:
            raise InputError("--runs", f"{name} was trained on data of another kind than {first}: {run.spec}, not "
                             f"{runs[first].spec}")  # fmt: skip
    return runs


def yardstick(runs: Mapping[str, Run]) -> list[SampleMetric]:
    """The metrics of samples in the first run's config. A run whose own config names none of them is refused: it was
    made for something else."""
    first, *others = runs
    metrics = dict(zip(runs[first].config["eval"]["metrics"], runs[first].metrics(), strict=True))
    metrics = {name: metric for name, metric in metrics.items() if isinstance(metric, SampleMetric)}
    if not metrics:
        raise InputError("--runs", f"{first} has no metric of samples in its eval section; begin with a run that has")
    for name in others:
        if not metrics.keys() & runs[name].config["eval"]["metrics"].keys():
            raise InputError("--runs", f"{name} has none of the metrics of {first} in its eval section: "
                             f"{', '.join(metrics)}")  # fmt: skip
    return list(metrics.values())


def plan(runs: Mapping[str, Run], counts: Sequence[int]) -> list[Cell]:
    """What can be drawn, run by run; says what its sampler cannot draw with so few evaluations."""
    cells, left_out = [], []
    for name, run in runs.items():
        guidance = {
            "name": "guidance_embedding" if run.config["guidance"]["name"] == "guidance_embedding" else "cfg",
            "scale": 1.0,
        }
        drawer = None
        for nfe in counts:
            try:
                sampler, _ = sections(run.config, {"evaluations": str(nfe)})
                make = drawer.with_settings if drawer else run.drawer  # what is measured for a drawer is measured once
                drawer = make(sampler=sampler, guidance=guidance)
            except InputError as error:
                if not error.field.startswith(("--evaluations", "sampler.steps", "sampler.grid")):
                    raise InputError("--runs", f"{name}: {error}") from None
                left_out.append(f"{label(name, nfe)}: left out: {error}")
                continue
            cells.append(Cell(name, run, nfe, sampler, drawer))
    if not cells:
        raise InputError("--nfe", f"no run can be drawn with these: {left_out[0]}")
    for line in left_out:
        print(line)
    return cells


def spell(part: str | Mapping[str, Any]) -> str:
    """A part as `experiments.sample` takes it: `{"name": "heun", "churn": 5}` -> `heun:churn=5`."""
    part = {"name": part} if isinstance(part, str) else part
    return ":".join([part["name"], *(f"{key}={value}" for key, value in part.items() if key != "name")])


def table(
    rows: Sequence[Mapping[str, Any]], figures: Sequence[str], names: Sequence[str], counts: Sequence[int], num: int,
    seed: int,
) -> str:  # fmt: skip
    """A row a run, a column a number of evaluations, the figures in a cell; empty where nothing was drawn."""
    cells = {(row["run"], row["nfe"]): " / ".join(f"{row[name]:.3f}" for name in figures) for row in rows}
    return "\n".join([
        f"{' / '.join(figures)} by evaluations of the model; {num} samples, seed {seed}, no guidance.",
        "",
        tables.markdown(["run", *map(str, counts)],
                        [[f"`{name}`", *(cells.get((name, nfe), "") for nfe in counts)] for name in names]),
    ])  # fmt: skip


def plot(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> Figure:
    """A panel a figure of merit, a line a run, against evaluations; what is not finite has no point. It is of no window
    and not known to pyplot."""
    names = list(dict.fromkeys(row["run"] for row in rows))
    counts = sorted({row["nfe"] for row in rows})
    size = 5 * len(figures), max(4, 0.2 * len(names) + 0.2)  # as high as the legend is
    plotted = Figure(figsize=size, dpi=120, layout="constrained")
    panels = plotted.subplots(1, len(figures), squeeze=False)[0]
    for panel, figure in zip(panels, figures, strict=True):
        for index, name in enumerate(names):
            points = sorted((row["nfe"], row[figure]) for row in rows
                            if row["run"] == name and np.isfinite(row[figure]))  # fmt: skip
            style = {"color": f"C{index % COLORS}", "marker": MARKERS[index % len(MARKERS)],
                     "linestyle": LINES[index // COLORS % len(LINES)]}  # fmt: skip
            panel.plot([nfe for nfe, _ in points], [value for _, value in points], label=name, markersize=5, **style)
        panel.set(title=figure, xlabel="evaluations of the model", xlim=(counts[0] / 1.3, counts[-1] * 1.3))
        panel.set_xscale("log", base=2)
        panel.set_xticks(counts, map(str, counts))
        panel.xaxis.set_minor_locator(NullLocator())
        if figure in LOGARITHMIC and any(0 < row[figure] < np.inf for row in rows):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            panel.yaxis.set_minor_locator(NullLocator())
        panel.grid(alpha=0.3)
    plotted.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize="small")
    return plotted


def drawn(figure: Figure) -> Image.Image:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
