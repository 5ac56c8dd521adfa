"""Compares trained runs at equal numbers of evaluations of the model, with the same metrics, noise and labels."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from PIL import Image

from diffusion.core import files, images
from diffusion.core.build import defaults, find
from diffusion.core.checks import at_most
from diffusion.core.types import InputError, SampleMetric
from diffusion.pipelines import tables
from diffusion.pipelines.evaluation import Drawn, check_finite, measure_samples
from diffusion.pipelines.generator import MOST_STEPS, PLACING, Generator
from diffusion.pipelines.overrides import is_whole, sections, spell
from diffusion.pipelines.run import Run, open_run
from diffusion.pipelines.sampling_sweep import write_table

SHOWN = 20  # samples per row of the contact sheet
LOGARITHMIC = ("energy_distance_ratio",)  # metrics whose axis is logarithmic
COLORS, MARKERS, LINES = 10, "osD^vPX", ("-", "--", ":")  # 10 and 7 are coprime, so 70 runs get different styles

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Cell:
    """A run at one number of evaluations.

    Attributes:
      name: The name of the run in the table.
      run: The trained model.
      nfe: Number of function evaluations: evaluations of the model per sample.
      sampler: The config's `sampler` section with the steps that these evaluations allow.
      generator: Draws the samples.
    """

    name: str
    run: Run
    nfe: int
    sampler: Mapping[str, Any]
    generator: Generator

    @property
    def label(self) -> str:
        return label(self.name, self.nfe)

    @property
    def settings(self) -> dict[str, Any]:
        """The columns of the table that say how the samples were drawn; options at their defaults are left out."""
        solver = {key: value for key, value in self.sampler.items() if key not in PLACING}
        return {
            "run": self.name,
            "objective": self.run.config["objective"]["name"],
            "step": self.run.step,
            "ema": self.run.ema or "none",
            "sampler": spell(_without_defaults("samplers", solver)),
            "grid": spell(_without_defaults("grids", self.sampler.get("grid", "trailing"))),
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
    """Draws `num` samples of each run at each number of evaluations, without guidance, and measures them.

    Sample i has the same label in every run, and starts from the same noise scaled by the sigma of the run's schedule.
    All arguments are checked before anything is drawn or written.

    Args:
      workdirs: The workdirs of the runs.
      nfe: Numbers of evaluations, as text. A sampler takes the largest number of steps that they allow.
      out: Folder for `compare.csv`, `compare.png` and `compare_samples.png`. The table has a row per run and number of
        evaluations and is rewritten after each; its column `seconds` includes compilation.
      docs: A Markdown file that the table is also inserted into (see `tables`). The pictures are written next to it.
      num: Samples per cell.
      seed: Seed of the noise.
      batch_size: Samples per batch.
      ema: The average of the parameters to use: each config's last if None, the raw parameters if "none".

    Raises:
      InputError: A run does not exist, is given twice or cannot be compared; a number is invalid; or an output is not
        writable.
      Diverged: Samples are not finite; the table and the pictures are written, with NaN for their metrics.
    """
    counts = whole_numbers(nfe)
    if docs:
        tables.surroundings(docs, "--docs")
    runs = open_runs(workdirs, ema)
    metrics = shared_metrics(runs)
    cells = grid_cells(runs, counts)
    files.make_folder(out, "--out")

    spec, cond = cells[0].run.spec, cells[0].run.conditions(num)
    is_image, figures = len(spec.shape) == 3, [metric.names[0] for metric in metrics]
    rows, shown, bad = [], [], []
    for cell in cells:
        if "prompt" in cond:  # the tokens of each run's own tokenizer
            cond = cell.run.conditions(num, prompts=cond["prompt"])
        samples = cell.generator.batches(cell.run.params, cond, num, seed=seed, batch_size=batch_size, title=cell.label)
        drawn = Drawn(samples, SHOWN if is_image else num)
        measured, problem = measure_samples(metrics, drawn, spec)
        if problem:
            logger.warning("%s: %s", cell.label, problem)
            bad.append(cell.label)
        values = {name: value for values in measured for name, value in values.items()}
        rows.append({**cell.settings, **values, "seconds": round(drawn.seconds, 3)})
        write_table(os.path.join(out, "compare.csv"), rows)  # after each cell, in case the comparison is interrupted
        logger.info("%s:  %s", cell.label, "  ".join(f"{name} {values[name]:.4f}" for name in figures))
        if len(runs) == 1 or all(cell.name != other.name for other, _ in shown):
            shown.append((cell, drawn.x))

    chart = rasterize(plot(rows, figures))
    sheet = images.labelled([x for _, x in shown], [cell.label for cell, _ in shown])
    for stem in filter(None, (os.path.join(out, "compare"), docs and os.path.splitext(docs)[0])):
        images.save_png(chart, f"{stem}.png")
        images.save_png(sheet, f"{stem}_samples.png")
    if docs:
        tables.insert(docs, [table(rows, figures, list(runs), counts, num, seed)], "--docs")
    logger.info("%d x %d samples: %s%s", len(rows), num, out, f" and {docs}" if docs else "")
    check_finite(bad, len(rows), "measurements")


def whole_numbers(texts: Sequence[str]) -> list[int]:
    """Parses numbers of evaluations: `["1", "8"]` -> `[1, 8]`."""
    for text in texts:
        if not is_whole(text) or int(text) < 1:
            raise InputError("--nfe", f"must be whole numbers of at least 1, as in 1,2,4,8,50; got {text!r}")
    counts = [at_most(MOST_STEPS, int(text), "--nfe") for text in texts]
    for count in counts:
        if counts.count(count) > 1:
            raise InputError("--nfe", f"has {count} more than once")
    if not counts:
        raise InputError("--nfe", "is empty; use for example 1,2,4,8,50")
    return counts


def open_runs(workdirs: Sequence[str], ema: str | None = None) -> dict[str, Run]:
    """Opens the runs and names each after its folder, or by its path if several folders have the same name."""
    if not workdirs:
        raise InputError("--runs", "is empty; use for example runs/digits,runs/digits_flow")
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
            raise InputError("--runs", f"{name} and {first} were trained on data of different specs: {run.spec} and "
                             f"{runs[first].spec}")  # fmt: skip
    return runs


def shared_metrics(runs: Mapping[str, Run]) -> list[SampleMetric]:
    """Returns the sample metrics of the first run's config, by which all runs are measured.

    Raises:
      InputError: The first run has no sample metric, or another run's config names none of them, which suggests that
        the runs solve different tasks.
    """
    first, *others = runs
    named = zip(runs[first].config["eval"]["metrics"], runs[first].metrics(), strict=True)
    metrics = {name: metric for name, metric in named if metric.kind == "samples"}
    if not metrics:
        raise InputError("--runs", f"{first} has no sample metric in its eval section; list a run that has one first")
    for name in others:
        if not metrics.keys() & runs[name].config["eval"]["metrics"].keys():
            raise InputError("--runs", f"{name} has none of the metrics of {first} in its eval section: "
                             f"{', '.join(metrics)}")  # fmt: skip
    return list(metrics.values())


def grid_cells(runs: Mapping[str, Run], counts: Sequence[int]) -> list[Cell]:
    """Returns the cells of the comparison, run by run.

    A number of evaluations that a run's sampler cannot use, because it is too small for one step, is logged and left
    out.
    """
    cells, left_out = [], []
    for name, run in runs.items():
        embedded = run.config["guidance"]["name"] == "guidance_embedding"
        guidance = {"name": "guidance_embedding" if embedded else "cfg", "scale": 1.0}
        generator = None
        for nfe in counts:
            try:
                sampler, _ = sections(run.config, {"evaluations": str(nfe)})
                # `with_settings` reuses what the first generator of a run has measured.
                make = generator.with_settings if generator else run.generator
                generator = make(sampler=sampler, guidance=guidance)
            except InputError as error:
                if not error.field.startswith(("--evaluations", "sampler.steps", "sampler.grid")):
                    raise InputError("--runs", f"{name}: {error}") from None
                left_out.append(f"{label(name, nfe)}: left out: {error}")
                continue
            cells.append(Cell(name, run, nfe, sampler, generator))
    if not cells:
        raise InputError("--nfe", f"no run can be sampled with these numbers of evaluations: {left_out[0]}")
    for line in left_out:
        logger.info("%s", line)
    return cells


def table(
    rows: Sequence[Mapping[str, Any]], figures: Sequence[str], names: Sequence[str], counts: Sequence[int], num: int,
    seed: int,
) -> str:  # fmt: skip
    """Returns a Markdown table with a row per run and a column per number of evaluations.

    A cell has the metrics `figures`, and is empty where nothing was drawn.
    """
    cells = {(row["run"], row["nfe"]): " / ".join(f"{row[name]:.3f}" for name in figures) for row in rows}
    return "\n".join([
        f"{' / '.join(figures)} by evaluations of the model; {num} samples, seed {seed}, no guidance.",
        "",
        tables.markdown(["run", *map(str, counts)],
                        [[f"`{name}`", *(cells.get((name, nfe), "") for nfe in counts)] for name in names]),
    ])  # fmt: skip


def plot(rows: Sequence[Mapping[str, Any]], figures: Sequence[str]) -> Figure:
    """Plots metrics against evaluations: a panel per metric, a line per run. Values that are not finite are left out.

    The figure is not registered with pyplot and needs no window.
    """
    names = list(dict.fromkeys(row["run"] for row in rows))
    counts = sorted({row["nfe"] for row in rows})
    size = 5 * len(figures), max(4, 0.2 * len(names) + 0.2)  # at least as high as the legend
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


def rasterize(figure: Figure) -> Image.Image:
    """Returns a matplotlib figure as an RGB image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def _without_defaults(family: str, section: str | Mapping[str, Any]) -> dict[str, Any]:
    """Returns a part's section without the options that have their default value."""
    section = {"name": section} if isinstance(section, str) else section
    default = defaults(find(family, section["name"], field=family))
    return {key: value for key, value in section.items() if key == "name" or default.get(key, ...) != value}
