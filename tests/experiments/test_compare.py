"""The comparison of runs: with the same noise, labels and metrics, and without losing results."""

import copy
import csv
import logging
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion.core import images
from diffusion.core.build import build
from diffusion.core.types import Spec, class_labels
from diffusion.pipelines import comparison, tables
from diffusion.pipelines.build_training import meta_of, training
from diffusion.pipelines.config import resolve
from diffusion.pipelines.generator import Generator
from diffusion.pipelines.model import model_of
from diffusion.pipelines.run import Run, open_run
from diffusion.training.resilience.guards import Diverged
from diffusion.training.trainer import Trainer
from tests.jobs import job
from tests.refusals import refused, refused_field
from tests.streams import measured

TRAILING, NUM = {"name": "trailing"}, 48
DDIM = {"name": "ddim", "eta": 0.5, "steps": 3, "grid": TRAILING}
PNDM = {"name": "pndm", "steps": 4, "grid": TRAILING}  # one evaluation more than steps
PNDM_EVALUATIONS = "diffusion.sampling.samplers.pndm.PNDM.evaluations"


def config_of(objective, sampler, metrics, *splits):
    return resolve({
        "seed": 0,
        "data": {"name": "digits", "split": splits[0]},
        "objective": objective,
        "network": {"name": "mlp", "width": 8, "depth": 1},
        "optimizer": {"name": "adam", "learning_rate": 1e-2, "warmup": 1},
        "ema": {"decays": (0.5,)},
        "train": {"steps": 4, "batch_size": 16},
        "checkpoint": {},
        "sampler": sampler,
        "guidance": {"name": "cfg", "scale": 3.0},
        "eval": {"data": {"name": "digits", "split": splits[1]}, "metrics": metrics},
        "mesh": {},
        "sharding": {"rules": ()},
    })  # fmt: skip


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory, mesh_of):
    """Two runs of four steps. The eval section of the second has other data, and only one metric of the first."""
    folder = tmp_path_factory.mktemp("runs")
    metrics = {"energy_distance": {"num": 10, "guidance": 1.0}, "svc_accuracy": {"num": 10, "guidance": 3.0}}
    flow = {"name": "flow_matching", "parameterization": {"name": "velocity"}}
    configs = {
        "flow": config_of(flow, DDIM, metrics, "train", "test"),
        "noise": config_of({"name": "denoising"}, PNDM, {"energy_distance": {}}, "test", "train"),
    }
    for name, config in configs.items():
        source = build("data", config["data"])
        meta, _ = meta_of(config, source.spec, str(folder / name))
        network, objective, *_ = model_of(meta)
        Trainer(source, network, objective, workdir=str(folder / name), meta=meta,
                **{**training(config), "mesh": mesh_of(1, 1, 1)}).fit()  # fmt: skip
    return [str(folder / name) for name in configs]


def compared(workdirs, nfe, out, **options):
    """Compares runs and returns the rows of the table that is written."""
    comparison.compare(workdirs, nfe.split(","), out=str(out), **{"num": NUM, "seed": 3, **options})
    return rows_of(out)


def rows_of(out):
    with open(out / "compare.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def written(workdirs, tmp_path_factory):
    """The folder that a comparison of both runs wrote to, with a documentation file, and the rows of its table."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "few.md").write_text(f"before\n\n{tables.BEGIN}\n\nan older table\n\n{tables.END}\n\nafter\n")
    return folder, compared(workdirs, "5,1", folder / "out", docs=str(folder / "few.md"))


def test_a_row_identifies_its_samples(written):
    _, rows = written
    flow = ("flow", "flow_matching", "ddim:eta=0.5")
    noise = ("noise", "denoising", "pndm")
    expected = [(*flow, "5", "5"), (*flow, "1", "1"), (*noise, "5", "4"), (*noise, "1", "1")]
    names = ("run", "objective", "sampler", "nfe", "steps")
    assert [tuple(row[name] for name in names) for row in rows] == expected
    assert all((row["step"], row["ema"], row["grid"]) == ("4", "0.5", "trailing") for row in rows)
    figures = ["energy_distance_ratio", "svc_accuracy", "svc_on_real"]
    assert list(rows[0]) == ["run", "objective", "step", "ema", "sampler", "grid", "nfe", "steps", *figures, "seconds"]
    assert all(float(row["seconds"]) > 0 for row in rows)


def test_all_runs_are_measured_by_the_first_runs_metrics(workdirs, written):
    """Draws and measures the samples again, without guidance although configs and metrics have it."""
    _, rows = written
    metrics = [metric for metric in open_run(workdirs[0]).metrics() if metric.kind == "samples"]
    labels = np.arange(NUM) % 10
    for index, workdir, sampler in ((0, workdirs[0], {**DDIM, "steps": 5}), (2, workdirs[1], PNDM)):
        run = open_run(workdir)
        x = run.generator(sampler=sampler, guidance={"name": "cfg", "scale": 1.0})(
            run.params, {"label": labels}, NUM, seed=3
        )
        x = images.from_uint8(images.to_uint8(x))
        for metric in metrics:
            for name, value in measured(metric, x, labels).items():
                assert float(rows[index][name]) == pytest.approx(value, rel=1e-5), name


def test_the_table_is_inserted_into_the_docs(written):
    folder, rows = written
    text = (folder / "few.md").read_text()
    figures = [f"{float(row['energy_distance_ratio']):.3f} / {float(row['svc_accuracy']):.3f}" for row in rows]
    assert (
        text
        == f"""before

{tables.BEGIN}

energy_distance_ratio / svc_accuracy by evaluations of the model; 48 samples, seed 3, no guidance.

| run | 5 | 1 |
|---|---|---|
| `flow` | {figures[0]} | {figures[1]} |
| `noise` | {figures[2]} | {figures[3]} |

{tables.END}

after
"""
    )


def test_pictures(written):
    folder, _ = written
    assert sorted(os.listdir(folder)) == ["few.md", "few.png", "few_samples.png", "out"]
    assert sorted(os.listdir(folder / "out")) == ["compare.csv", "compare.png", "compare_samples.png"]
    for ending in (".png", "_samples.png"):
        assert (folder / f"few{ending}").read_bytes() == (folder / f"out/compare{ending}").read_bytes()
    pixels = np.asarray(Image.open(folder / "few.png"))
    for color in ((31, 119, 180), (255, 127, 14)):  # the colors of the two lines
        assert (pixels == color).all(axis=-1).sum() > 50
    width, height = Image.open(folder / "few_samples.png").size
    assert width > 20 * 50 and height == 2 * (48 + 2 * 2)


@pytest.mark.slow
def test_the_same_noise_for_every_run(workdirs, tmp_path):
    """A copy of a run gives the same figures, as do other batches; another seed gives other figures. Runs whose folders
    have the same name are named by their paths."""
    copy = shutil.copytree(workdirs[0], tmp_path / "copy/flow")
    first, second = compared([workdirs[0], str(copy)], "2", tmp_path / "out")
    same = first.keys() - {"run", "seconds"}
    assert (first["run"], second["run"]) == (workdirs[0], str(copy))
    assert {name: first[name] for name in same} == {name: second[name] for name in same}
    (batches,) = compared(workdirs[:1], "2", tmp_path / "batches", batch_size=16)
    (other,) = compared(workdirs[:1], "2", tmp_path / "other", seed=4)
    assert float(batches["energy_distance_ratio"]) == pytest.approx(float(first["energy_distance_ratio"]), rel=1e-4)
    assert other["energy_distance_ratio"] != first["energy_distance_ratio"]


@pytest.mark.slow
def test_raw_parameters(workdirs, tmp_path):
    averaged, raw = (compared(workdirs[:1], "1", tmp_path / str(ema), ema=ema)[0] for ema in (None, "none"))
    assert (averaged["ema"], raw["ema"]) == ("0.5", "none")
    assert averaged["energy_distance_ratio"] != raw["energy_distance_ratio"]


CHOSEN = [
    ([0], ["flow, 2 evaluations", "flow, 1 evaluation"]),
    ([1, 0], ["noise, 6 evaluations", "flow, 2 evaluations"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "labels"), CHOSEN)
def test_rows_of_the_contact_sheet(workdirs, tmp_path, monkeypatch, chosen, labels):
    """Shows all numbers of evaluations of a single run, or the first that each of several runs can use."""
    monkeypatch.setattr(PNDM_EVALUATIONS, lambda self, steps, to_data=True: steps + 4)
    seen = []
    real = images.labelled
    monkeypatch.setattr(images, "labelled", lambda rows, labels: seen.append((rows, labels)) or real(rows, labels))
    compared([workdirs[index] for index in chosen], "2,1" if len(chosen) == 1 else "2,6", tmp_path)
    (rows, shown), *_ = seen
    assert shown == labels
    assert [x.shape for x in rows] == [(20, 8, 8, 1)] * 2


@pytest.mark.slow
def test_an_interrupted_comparison_keeps_its_results(workdirs, tmp_path, monkeypatch):
    """Interrupts the third cell: the table has the first two, and the documentation is unchanged."""
    calls = []
    real = comparison.measure_samples

    def interrupted(*given):
        calls.append(given)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(*given)

    docs = tmp_path / "few.md"
    docs.write_text(f"{tables.BEGIN}{tables.END}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(comparison, "measure_samples", interrupted)
        compared(workdirs, "1,2,5", tmp_path / "out", docs=str(docs))
    kept = rows_of(tmp_path / "out")
    assert [(row["run"], row["nfe"]) for row in kept] == [("flow", "1"), ("flow", "2")]
    assert os.listdir(tmp_path / "out") == ["compare.csv"] and docs.read_text() == f"{tables.BEGIN}{tables.END}"
    whole = compared(workdirs, "1,2,5", tmp_path / "out", docs=str(docs))
    assert [row["svc_accuracy"] for row in whole[:2]] == [row["svc_accuracy"] for row in kept] and len(whole) == 6


def test_samples_that_are_not_finite(workdirs, tmp_path, monkeypatch, caplog):
    """Their metrics are NaN, the other cells are compared, and the job ends with an error."""
    real = Generator.batches

    def broken(generator, params, *given, **options):
        scale = np.nan if len(generator.times) == 2 else 1.0
        yield from ((scale * x, cond) for x, cond in real(generator, params, *given, **options))

    monkeypatch.setattr(Generator, "batches", broken)
    problem = "1 of 2 measurements: flow, 1 evaluation"
    with caplog.at_level(logging.WARNING, "diffusion"), pytest.raises(Diverged, match=problem):
        compared(workdirs[:1], "1,2", tmp_path, batch_size=16)
    one, two = rows_of(tmp_path)
    assert "flow, 1 evaluation: 16 of 16 samples are not finite" in caplog.text
    assert one["svc_accuracy"] == one["energy_distance_ratio"] == "nan" != two["energy_distance_ratio"]


def test_too_few_evaluations_for_a_sampler_are_reported(workdirs, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(PNDM_EVALUATIONS, lambda self, steps, to_data=True: steps + 4)
    with caplog.at_level(logging.INFO, "diffusion"):
        compared(workdirs[1:], "1,4,6", tmp_path)
    lines = [record.getMessage() for record in caplog.records if record.name == comparison.__name__]
    assert lines[0].startswith("noise, 1 evaluation: left out: --evaluations: ")
    assert lines[1].startswith("noise, 4 evaluations: left out: --evaluations: ")
    assert lines[2].startswith("noise, 6 evaluations:  energy_distance_ratio ")
    with refused("--nfe"):
        compared(workdirs[1:], "1,4", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def changed(run, **attributes):
    """Returns a copy of a run with other attributes."""
    other = copy.copy(run)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def changed_config(run, **sections):
    return changed(run, config={**run.config, **sections})


@pytest.mark.parametrize(
    ("name", "used"), [("guidance_embedding", "guidance_embedding"), ("apg", "cfg"), ("cfg", "cfg")]
)
def test_runs_are_sampled_with_a_guidance_scale_of_one(workdirs, monkeypatch, name, used):
    """The wrappers of the guidance are dropped; a model with a guidance embedding still receives its scale."""
    run = changed_config(open_run(workdirs[0]), guidance={"name": name, "scale": 3.0, "rescale": {"factor": 0.5}})
    monkeypatch.setattr(Run, "generator", lambda run, **sections: sections)
    (cell,) = comparison.grid_cells({"flow": run}, [2])
    assert cell.generator["guidance"] == {"name": used, "scale": 1.0}
    assert cell.generator["sampler"] == {**run.config["sampler"], "steps": 2}


REFUSED = {
    "a run that does not exist": ({"runs": "absent"}, "--runs"),
    "no runs": ({"runs": ""}, "--runs"),
    "a run twice": ({"runs": "flow,noise,flow"}, "--runs"),
    "an unknown average": ({"ema": "0.9"}, "--runs"),
    "zero": ({"nfe": "1,0"}, "--nfe"),
    "negative": ({"nfe": "-1"}, "--nfe"),
    "not a number": ({"nfe": "1,few"}, "--nfe"),
    "empty number": ({"nfe": "1,"}, "--nfe"),
    "a number twice": ({"nfe": "4,1,04"}, "--nfe"),
    "no docs": ({"docs": "absent.md"}, "--docs"),
    "no markers": ({"docs": "bare.md"}, "--docs"),
    "markers in the wrong order": ({"docs": "upside_down.md"}, "--docs"),
    "no folder": ({"out": "bare.md/out"}, "--out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(workdirs, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    for workdir in workdirs:
        os.symlink(workdir, os.path.basename(workdir))
    pathlib.Path("bare.md").write_text("no markers")
    pathlib.Path("upside_down.md").write_text(f"{tables.END}{tables.BEGIN}")
    before = sorted(os.listdir())
    options, field = REFUSED[case]
    options = {"runs": "flow,noise", "nfe": "1,5", "out": "out", **options}
    lists = [list(filter(None, options.pop("runs").split(","))), options.pop("nfe").split(",")]
    with refused(field):
        comparison.compare(*lists, **options)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda name, run: changed(run, spec=Spec(run.spec.x, class_labels(9))) if name == "noise" else run, "noise"),
        (lambda name, run: changed_config(run, eval={"metrics": {"likelihood": {}}}) if name == "noise" else run,
         "noise"),
        (lambda name, run: changed_config(run, eval={**run.config["eval"], "metrics": {"likelihood": {}}}),
         "flow"),
        (lambda name, run: changed_config(run, sampler={"name": "consistency", "steps": 1}),
         "flow: sampler.name: "),
    ],
    ids=["another kind of data", "no metric in common", "no metric of samples", "an unsuitable sampler"],
)  # fmt: skip
def test_runs_that_cannot_be_compared(workdirs, tmp_path, monkeypatch, change, problem):
    """The message names the run first."""

    def opened(workdir, ema):
        return change(os.path.basename(workdir), open_run(workdir, ema))

    monkeypatch.setattr(comparison, "open_run", opened)
    with refused("--runs") as error:
        comparison.compare(workdirs, ["5"], out=str(tmp_path / "out"))
    assert error.value.problem.startswith(problem)
    assert not (tmp_path / "out").exists()


def test_lines_of_the_plot():
    """A line has the figures of its run in the order of evaluations, on axes with ticks at these numbers."""
    rows = [{"run": run, "nfe": nfe, "energy_distance_ratio": nfe * scale, "other": -scale / nfe}
            for run, scale in (("a", 1.3), ("b", 1.1)) for nfe in (4, 1, 2) if (run, nfe) != ("b", 1)]  # fmt: skip
    figure = comparison.plot(rows, ["energy_distance_ratio", "other"])
    ratio, other = figure.axes
    assert (ratio.get_yscale(), other.get_yscale()) == ("log", "linear")
    assert [line.get_xydata().tolist() for line in ratio.get_lines()] == [
        [[1, 1.3], [2, 2.6], [4, 5.2]], [[2, 2.2], [4, 4.4]]
    ]  # fmt: skip
    assert other.get_lines()[1].get_xydata().tolist() == [[2, -0.55], [4, -0.275]]
    for panel in figure.axes:
        assert [text.get_text() for text in panel.get_xticklabels()] == ["1", "2", "4"]
        step = np.diff(panel.transData.transform([(x, 2) for x in (1, 2, 4)])[:, 0])
        assert step[0] == pytest.approx(step[1])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_values_that_are_not_finite_are_left_out():
    rows = [{"run": run, "nfe": nfe, "energy_distance_ratio": value}
            for run, nfe, value in (("a", 1, np.inf), ("a", 2, 3.0), ("b", 1, np.nan))]  # fmt: skip
    for some, points in ((rows, [[[2, 3.0]], []]), (rows[:1], [[]])):
        figure = comparison.plot(some, ["energy_distance_ratio"])
        comparison.rasterize(figure)
        assert [line.get_xydata().tolist() for line in figure.axes[0].get_lines()] == points


@pytest.mark.parametrize(("low", "high"), [(1.1, 1.4), (3, 9), (1.2, 40), (1, 1e5)])
def test_a_logarithmic_axis_has_labels(low, high):
    rows = [{"run": "a", "nfe": 1, "energy_distance_ratio": low}, {"run": "a", "nfe": 2, "energy_distance_ratio": high}]
    figure = comparison.plot(rows, ["energy_distance_ratio"])
    comparison.rasterize(figure)
    (panel,) = figure.axes
    bottom, top = panel.get_ylim()
    shown = [text for text in panel.get_yticklabels() if bottom <= text.get_position()[1] <= top]
    assert len(shown) >= 3
    assert any(text.get_position()[1] ** 2 < bottom * top for text in shown)  # also below the middle
    for text in shown:
        assert float(text.get_text()) == pytest.approx(text.get_position()[1])


def test_the_legend_of_many_runs_fits():
    rows = [{"run": f"a run of a long name, {run}", "nfe": nfe, "f": run * nfe} for run in range(40) for nfe in (1, 2)]
    figure = comparison.plot(rows, ["f"])
    pixels = np.asarray(comparison.rasterize(figure))
    legend, panel = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert legend.y0 >= 0 and legend.x1 <= pixels.shape[1] and legend.x0 >= panel.x1
    styles = {(line.get_color(), line.get_marker()) for line in figure.axes[0].get_lines()}
    assert len(styles) == 40


@pytest.mark.slow
def test_the_job(workdirs, tmp_path):
    flags = f"--runs={','.join(workdirs)} --nfe=1 --num=20 --seed=2 --ema=none --out={tmp_path}".split()
    done = job("compare", *flags)
    assert done.returncode == 0, done.stderr
    assert [(row["run"], row["nfe"], row["ema"]) for row in rows_of(tmp_path)] == [
        (name, "1", "none") for name in ("flow", "noise")
    ]
    assert "flow, 1 evaluation 20/20 (100 %)" in done.stderr
    assert "flow, 1 evaluation:  energy_distance_ratio " in done.stdout
    assert refused_field(job("compare", *flags, "--num=0")) == "--num"


@pytest.mark.slow
def test_the_sampler_table_is_inserted_into_the_docs(workdirs, tmp_path):
    docs = tmp_path / "samplers.md"
    docs.write_text(f"before {tables.BEGIN} {tables.END} after")
    done = job("sampler_table", f"--workdirs={workdirs[0]}", f"--out={docs}", "--num=20", "--samplers=heun",
               "--evaluations=1,3")  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, title, head, *rows, after = filter(None, docs.read_text().splitlines())
    assert (before, after) == (f"before {tables.BEGIN}", f"{tables.END} after")
    assert title.endswith("20 samples: energy_distance_ratio / svc_accuracy by evaluations of the model.")
    assert (head, rows[0]) == ("| sampler | 1 | 3 |", "|---|---|---|") and len(rows) == 2
    assert rows[1].startswith("| `heun` | ") and rows[1].count(" / ") == 2
