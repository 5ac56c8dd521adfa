"""The jobs as a user runs them: what they write, and one line for each thing they refuse."""

import concurrent.futures
import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.jobs import job, one_line

TINY = (
    "--config=configs/digits.py --config.train.steps=2 --config.train.batch_size=16 --config.optimizer.warmup=1 "
    "--config.network.width=8 --config.network.head_dim=8 --config.train.preview_every=0 --config.sampler.steps=2"
).split()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    done = job("train", *TINY, f"--workdir={path}")
    assert done.returncode == 0, done.stderr
    return path


def test_train_writes(workdir):
    config = json.loads((workdir / "config.json").read_text())
    assert config["network"]["width"] == 8 and config["train"]["steps"] == 2
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2 and line.keys() >= {"loss", "grad_norm", "learning_rate", "images_per_second"}
    assert "net/conv_in/kernel" in (workdir / "parameters.txt").read_text()


def test_sample_writes(workdir, tmp_path):
    done = job("sample", f"--workdir={workdir}", "--num=7", "--labels=3,1", "--guidance=2", "--seed=4", "--steps=3",
               "--sampler=heun:churn=2", "--grid=karras:rho=5", "--interval=0.1,0.9", "--rescale=0.5", "--ema=0.99",
               f"--out={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = np.load(tmp_path / "samples.npz", allow_pickle=False)
    assert saved["samples"].shape == (7, 8, 8, 1) and saved["samples"].dtype == np.uint8
    assert saved["labels"].tolist() == [3, 1, 3, 1, 3, 1, 3]
    settings = json.loads(str(saved["settings"]))
    assert settings["sampler"] == {"name": "heun", "churn": 2, "steps": 3, "grid": {"name": "karras", "rho": 5}}
    around = {"interval": {"low": 0.1, "high": 0.9}, "rescale": {"factor": 0.5}}
    assert settings["guidance"] == {"name": "cfg", "scale": 2, **around}
    assert settings["seed"] == 4 and settings["ema"] == "0.99"
    assert Image.open(tmp_path / "samples.png").size[0] > 48
    assert str(tmp_path / "samples.png") in done.stdout


def test_sweep_writes(workdir, tmp_path):
    """Six combinations of two step counts: two compilations; the sheet has a row for each, the table the metrics."""
    done = job("sample", f"--workdir={workdir}", "--num=20", "--sweep=steps=2,3;guidance=1,2,4", "--metrics",
               f"--out={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "sweep.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["steps"], row["guidance"]) for row in rows] == [(s, g) for s in "23" for g in "124"]
    assert [row["compiled"] for row in rows] == ["1", "0", "0", "1", "0", "0"]
    assert all(float(row["energy_distance_ratio"]) > 0 and row["evaluations"] == row["steps"] for row in rows)
    assert Image.open(tmp_path / "sweep.png").size[1] > 6 * 48


def test_autoguidance_and_the_analytic_variance(workdir, tmp_path):
    """The one reads a second model, the other measures this one on its data."""
    guidance = f"autoguidance:scale=2:worse={{'workdir':'{workdir}','ema':'0.99'}}"
    done = job("sample", f"--workdir={workdir}", "--num=4", f"--guidance={guidance}", "--steps=3",
               "--sampler=ancestral:variance=analytic", f"--out={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = job("sample", f"--workdir={workdir}", f"--guidance={guidance.replace('0.99', '0.5')}")
    assert "guidance.worse.ema: the run has no average '0.5'" in one_line(done)


def test_evaluate_prints_and_writes(workdir):
    done = job("evaluate", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    results = json.loads((workdir / "evaluation.json").read_text())
    assert f"svc_accuracy {results['svc_accuracy']:.4f}" in done.stdout
    assert f"energy_distance_ratio {results['energy_distance_ratio']:.4f}" in done.stdout


BAD_TRAIN = {
    "missing file": (["--config=configs/none.py"], "--config: no file 'configs/none.py'; there are: configs/cifar10"),
    "no get_config": (["--config=experiments/__init__.py"], "--config: experiments/__init__.py has no get_config()"),
    "no config": (["--config="], "--config: no file"),
    "unknown key": (["--config.train.stepz=3"], "--config.train.stepz: the config has no 'stepz'; did you mean"),
    "wrong type": (["--config.train.steps=many"], "steps"),
    "unknown sampler": (["--config.sampler.name=dimm"], "sampler.name: no 'dimm' in samplers; did you mean 'ddim'"),
    "unknown network": (["--config.network.name=unnet"], "network.name: no 'unnet' in networks; did you mean 'unet'"),
    "unknown objective": (["--config.objective.name=dpm"], "objective.name: no 'dpm' in objectives; did you mean"),
    "unknown data": (["--config.data.name=digit"], "data.name: no 'digit' in data; did you mean 'digits'"),
    "no such keyword": (["--config.sampler.name=ancestral"], "sampler.eta: diffusion/samplers/ancestral.py takes no"),
    "indivisible batch": (["--config.train.accumulate=3"], "train.accumulate: 3 does not divide the batch of 16"),
    "mesh": (["--config.mesh.fsdp=3"], "mesh.fsdp: "),
    "no steps": (["--config.train.steps=0"], "train.steps: must be at least 1, got 0"),
    "negative steps": (["--config.train.steps=-5"], "train.steps: must be at least 1, got -5"),
    "bad rate": (["--config.optimizer.learning_rate=-1.0"], "optimizer.learning_rate: must be positive"),
    "bad optimizer": (["--config.optimizer.name=adamm"], "optimizer.name: optax has no optimizer 'adamm'"),
    "guidance untrained": (["--config.train.cond_drop_rate=0.0"], "guidance.scale: the model was trained with"),
    "no table": (["--config.objective.schedule.num_steps=0"], "objective.schedule.num_steps: must be at least 1"),
    "eps at zero SNR": (
        ["--config.objective.schedule={'name': 'flow'}"],
        "objective.parameterization: {'name': 'eps'} does not exist at t = 1",
    ),
    "unknown argument": (["--config=configs/mixture.py:dddpm"], "--config=configs/mixture.py:dddpm: raised KeyError"),
    "stray argument": (["stray"], "stray: is no flag"),
}  # fmt: skip


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """All bad trainings, two at a time: `{name: (result, its workdir)}`."""
    folder = tmp_path_factory.mktemp("bad")

    def run(name):
        path = folder / name.replace(" ", "_")
        given = BAD_TRAIN[name][0]
        base = [] if given[0].startswith("--config=") else TINY
        return name, (job("train", *base, *given, f"--workdir={path}"), path)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return dict(pool.map(run, BAD_TRAIN))


@pytest.mark.parametrize("name", BAD_TRAIN)
def test_train_refuses(refusals, name):
    done, path = refusals[name]
    assert BAD_TRAIN[name][1] in one_line(done)
    assert not path.exists()


def test_train_refuses_a_workdir_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    done = job("train", *TINY, f"--workdir={tmp_path}/file/run")
    assert "workdir: " in one_line(done) and "cannot be written" in done.stderr


def test_train_refuses_another_network(workdir):
    before = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))
    done = job("train", *TINY, "--config.network.num_res_blocks=2", f"--workdir={workdir}")
    assert "network.num_res_blocks: is 2, but the workdir was trained with 1" in one_line(done)
    done = job("train", *TINY, "--config.ema.decays=(0.5,)", f"--workdir={workdir}")
    assert "workdir: " in one_line(done) and "ema/0.5/" in done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*")) == before


BAD_SAMPLE = [
    (["--labels=0,10"], "--labels: must be numbers from 0 to 9"),
    (["--labels=-1"], "--labels: must be numbers from 0 to 9"),
    (["--labels=cat"], "--labels: must be numbers from 0 to 9"),
    (["--labels="], "--labels: "),
    (["--num=0"], "--num: must be at least 1, got 0"),
    (["--num=few"], "--num"),
    (["--steps=0"], "--steps: must be a whole number of at least 1, got 0"),
    (["--sampler=dimm"], "--sampler: no 'dimm' in samplers; did you mean 'ddim'"),
    (["--grid=karas"], "sampler.grid: no 'karas' in grids"),
    (["--sampler=lcm"], "sampler.name: samples consistency models"),
    (["--interval=0.9,0.1"], "guidance.interval: is upside down"),
    (["--sweep=steps=2;sampler=ddim,lms"], "--sweep: at steps=2 sampler=lms: sampler.steps: must be at least"),
    (["--steps=3", "--evaluations=3"], "--steps: follow from --evaluations"),
    (["--ema=0.5"], "ema: the run has no average '0.5'; one of: 0.99, 0.998, none"),
    (["--sede=0"], "sede"),
]


@pytest.fixture(scope="module")
def sample_refusals(workdir, tmp_path_factory):
    """All bad samplings, two at a time."""
    folder = tmp_path_factory.mktemp("bad") / "out"

    def run(row):
        return job("sample", f"--workdir={workdir}", f"--out={folder}", *row[0])

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return folder, list(pool.map(run, BAD_SAMPLE))


@pytest.mark.parametrize("index", range(len(BAD_SAMPLE)), ids=[" ".join(flags) for flags, _ in BAD_SAMPLE])
def test_sample_refuses(sample_refusals, index):
    folder, done = sample_refusals
    assert BAD_SAMPLE[index][1] in one_line(done[index])
    assert not folder.exists()


@pytest.mark.parametrize("kind", ["absent", "empty", "damaged"])
def test_sample_refuses_a_workdir_without_a_checkpoint(workdir, tmp_path, kind):
    run = tmp_path / "run"
    if kind == "empty":
        (run / "checkpoints").mkdir(parents=True)
    if kind == "damaged":
        shutil.copytree(workdir, run)
        for path in (run / "checkpoints/2").rglob("*"):
            if path.is_file() and path.name != "commit_success.txt":
                path.write_bytes(b"?")
    done = job("sample", f"--workdir={run}")
    expected = {"absent": "does not exist", "empty": "holds no checkpoint", "damaged": "is damaged"}[kind]
    assert "workdir: " in one_line(done) and expected in done.stderr
    assert not (run / "samples").exists()
    if kind == "damaged":
        before = sorted(path for path in run.rglob("*"))
        done = job("train", *TINY, f"--workdir={run}")
        assert "is damaged" in one_line(done) and sorted(path for path in run.rglob("*")) == before


def test_points_in_the_plane(tmp_path):
    """The same jobs on data that is no image, with an objective that has two networks."""
    run = tmp_path / "run"
    flags = ("--config.train.steps=2", "--config.optimizer.warmup=1", "--config.train.preview_every=2")
    done = job("train", "--config=configs/mixture.py:vdm", *flags, "--config.eval.metrics.likelihood.num=16",
               "--config.eval.metrics.likelihood.steps=8", "--config.eval.metrics.likelihood.bound_steps=8",
               f"--workdir={run}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(run / "previews/step_0000002.png").size == (480, 480)
    done = job("sample", f"--workdir={run}", "--num=30", "--steps=2")
    assert done.returncode == 0, done.stderr
    samples = np.load(run / "samples/samples.npz")["samples"]
    assert samples.shape == (30, 2) and samples.dtype == np.float32
    done = job("evaluate", f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    assert set(json.loads((run / "evaluation.json").read_text())) == {"nll", "bound", "entropy", "settings"}


def test_debug_shows_the_traceback(workdir):
    done = job("sample", f"--workdir={workdir}", "--num=0", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr
