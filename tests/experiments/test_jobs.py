"""The jobs as a user runs them: what they write, and the field that a refusal names."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.jobs import job
from tests.refusals import refused_field
from tests.tiers import slow_except

TINY = (
    "--config=configs/digits.py --config.train.steps=2 --config.train.batch_size=16 --config.optimizer.warmup=1 "
    "--config.network={'name':'mlp','width':16,'depth':1} --config.train.preview_every=0 --config.sampler.steps=2"
).split()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run of two steps."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    done = job("train", *TINY, f"--workdir={path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"python -m experiments.sample --workdir={path}\n")
    return path


def test_train_writes(workdir):
    config = json.loads((workdir / "config.json").read_text())
    assert config["network"]["width"] == 16 and config["train"]["steps"] == 2
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 2 and line.keys() >= {"loss", "grad_norm", "learning_rate", "images_per_second"}
    assert "net/linear_out/kernel" in (workdir / "parameters.txt").read_text()


def test_sample_writes(workdir, tmp_path):
    done = job("sample", f"--workdir={workdir}", "--num=7", "--labels=3,1", "--guidance=2", "--seed=4", "--steps=3",
               "--sampler=heun:churn=2", "--grid=karras:rho=5", "--interval=0.1,0.9", "--rescale=0.5", "--ema=0.99",
               f"--out={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    saved = np.load(tmp_path / "samples.npz", allow_pickle=False)
    assert saved["arr_0"].shape == (7, 8, 8, 1) and saved["arr_0"].dtype == np.uint8  # as ADM's evaluator reads it
    assert saved["labels"].tolist() == [3, 1, 3, 1, 3, 1, 3]
    settings = json.loads(str(saved["settings"]))
    assert settings["sampler"].items() >= {"name": "heun", "churn": 2, "steps": 3}.items()
    assert settings["sampler"]["grid"] == {"name": "karras", "rho": 5}
    wrappers = {"interval": {"low": 0.1, "high": 0.9}, "rescale": {"factor": 0.5}}
    assert settings["guidance"].items() >= {"name": "cfg", "scale": 2, **wrappers}.items()
    assert settings["seed"] == 4 and settings["ema"] == "0.99"
    assert Image.open(tmp_path / "samples.png").size[0] > 48
    assert str(tmp_path / "samples.png") in done.stdout


@pytest.mark.slow
def test_sweep_writes(workdir, tmp_path):
    """Six combinations with two numbers of steps compile twice; each has a row of pictures and of metrics."""
    done = job("sample", f"--workdir={workdir}", "--num=20", "--sweep=steps=2,3;guidance=1,2,4", "--metrics",
               f"--out={tmp_path}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "sweep.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["steps"], row["guidance"]) for row in rows] == [(s, g) for s in "23" for g in "124"]
    assert [row["compiled"] for row in rows] == ["1", "0", "0", "1", "0", "0"]
    assert all(float(row["energy_distance_ratio"]) > 0 and row["evaluations"] == row["steps"] for row in rows)
    assert Image.open(tmp_path / "sweep.png").size[1] > 6 * 48


@pytest.mark.slow
def test_autoguidance_and_the_analytic_variance(workdir, tmp_path):
    """Autoguidance reads a second model; the analytic variance measures this one on its data."""
    guidance = f"autoguidance:scale=2:worse={{'workdir':'{workdir}','ema':'0.99'}}"
    done = job("sample", f"--workdir={workdir}", "--num=4", f"--guidance={guidance}", "--steps=3",
               "--sampler=ancestral:variance=analytic", f"--out={tmp_path}", "--out_format=png")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [Image.open(path).size for path in sorted((tmp_path / "images").iterdir())] == [(8, 8)] * 4
    done = job("sample", f"--workdir={workdir}", f"--guidance={guidance.replace('0.99', '0.5')}")
    assert refused_field(done) == "guidance.worse.ema"


def test_evaluate_prints_and_writes(workdir):
    done = job("evaluate", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    results = json.loads((workdir / "evaluation.json").read_text())
    assert f"svc_accuracy {results['svc_accuracy']:.4f}" in done.stdout
    assert f"energy_distance_ratio {results['energy_distance_ratio']:.4f}" in done.stdout
    done = job("evaluate", f"--workdir={workdir}", "--sampler=euler", "--steps=1", "--step=2")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (workdir / "evaluations.jsonl").read_text().splitlines()]
    assert [line["settings"]["sampler"]["name"] for line in lines] == ["ddim", "euler"]


BAD_TRAIN = {
    "missing file": (["--config=configs/none.py"], "--config"),
    "no get_config": (["--config=experiments/__init__.py"], "--config"),
    "no config": (["--config="], "--config"),
    "unknown option": (["--config.train.stepz=3"], "--config.train.stepz"),
    "wrong type": (["--config.train.steps=many"], "train.steps"),
    "unknown sampler": (["--config.sampler.name=dimm"], "--config.sampler.name"),
    "no such keyword": (["--config.sampler.name=ancestral", "--config.sampler.eta=1"], "--config.sampler.eta"),
    "indivisible batch": (["--config.train.accumulate=3"], "train.accumulate"),
    "mesh": (["--config.mesh.fsdp=3"], "mesh.fsdp"),
    "no steps": (["--config.train.steps=0"], "train.steps"),
    "bad rate": (["--config.optimizer.learning_rate=-1.0"], "optimizer.learning_rate"),
    "bad optimizer": (["--config.optimizer.name=adamm"], "optimizer.name"),
    "guidance untrained": (["--config.train.cond_drop_rate=0.0"], "guidance.scale"),
    "no table": (["--config.objective.schedule.num_steps=0"], "objective.schedule.num_steps"),
    "eps at zero SNR": (["--config.objective.schedule=flow"], "objective.parameterization"),
    "unknown argument": (["--config=configs/mixture.py:dddpm"], "--config=configs/mixture.py:dddpm"),
    "best of no metric": (["--config.checkpoint.keep_best=los", "--check"], "checkpoint.keep_best"),
    "best of no metric, found before the first step": (["--config.checkpoint.keep_best=los"], "checkpoint.keep_best"),
    "empty workdir": (["--workdir=", "--check"], "--workdir"),
    "stray argument": (["stray"], "stray"),
}


# The others end in the same way; `tests/experiments/test_fuzz.py` runs such jobs without a process for each.
DEFAULT = ("missing file", "unknown option", "mesh", "eps at zero SNR", "stray argument")


@pytest.mark.parametrize("name", slow_except(DEFAULT, BAD_TRAIN))
def test_train_refuses(name, tmp_path):
    flags, field = BAD_TRAIN[name]
    base = [] if flags[0].startswith("--config=") else TINY
    done = job("train", f"--workdir={tmp_path}/run", *base, *flags)
    assert refused_field(done) == field
    assert not (tmp_path / "run").exists()


def test_a_missing_flag_is_named():
    assert refused_field(job("train", *TINY)) == "--workdir"


def test_train_refuses_a_workdir_it_cannot_write(tmp_path):
    (tmp_path / "file").write_text("")
    done = job("train", *TINY, f"--workdir={tmp_path}/file/run")
    assert refused_field(done) == "workdir"


def test_train_refuses_another_network(workdir):
    before = sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*"))
    done = job("train", *TINY, "--config.network.depth=2", f"--workdir={workdir}")
    assert refused_field(done) == "network.depth"
    done = job("train", *TINY, "--config.ema.decays=(0.5,)", f"--workdir={workdir}")
    assert refused_field(done) == "workdir" and "ema/0.5/" in done.stderr
    assert sorted((path, path.stat().st_mtime_ns) for path in workdir.rglob("*")) == before


BAD_SAMPLE = {
    "--labels=0,10": "--labels",
    "--labels=cat": "--labels",
    "--labels=": "--labels",
    "--num=0": "--num",
    "--steps=0": "--steps",
    "--sampler=dimm": "--sampler",
    "--grid=karas": "sampler.grid",
    "--sampler=lcm": "sampler.name",
    "--interval=0.9,0.1": "guidance.interval",
    "--sweep=steps=2;sampler=ddim,lcm": "--sweep",
    "--steps=3 --evaluations=3": "--steps",
    "--ema=0.5": "ema",
    "--step=1": "step",
}


@pytest.mark.parametrize(
    "flags", slow_except(("--labels=0,10", "--sampler=lcm", "--sweep=steps=2;sampler=ddim,lcm"), BAD_SAMPLE)
)
def test_sample_refuses(workdir, tmp_path, flags):
    done = job("sample", f"--workdir={workdir}", f"--out={tmp_path}/out", *flags.split())
    assert refused_field(done) == BAD_SAMPLE[flags]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["absent", "empty", "corrupt"])
def test_sample_refuses_a_workdir_without_a_checkpoint(workdir, tmp_path, kind):
    run = tmp_path / "run"
    if kind == "empty":
        (run / "checkpoints").mkdir(parents=True)
    if kind == "corrupt":
        shutil.copytree(workdir, run)
        for path in (run / "checkpoints/2").rglob("*"):
            if path.is_file() and path.name != "commit_success.txt":
                path.write_bytes(b"?")
    done = job("sample", f"--workdir={run}")
    assert refused_field(done) == "workdir"
    assert not (run / "samples").exists()
    if kind == "corrupt":
        before = sorted(path for path in run.rglob("*"))
        done = job("train", *TINY, f"--workdir={run}")
        assert refused_field(done) == "workdir" and sorted(path for path in run.rglob("*")) == before


@pytest.mark.slow
def test_points_in_the_plane(tmp_path):
    """The same jobs on points instead of images, with an objective that trains two networks."""
    run = tmp_path / "run"
    flags = ("--config.train.steps=2", "--config.optimizer.warmup=1", "--config.train.preview_every=2",
             "--config.network.width=16", "--config.network.depth=1")  # fmt: skip
    done = job("train", "--config=configs/mixture.py:vdm", *flags, "--config.eval.metrics.likelihood.num=16",
               "--config.eval.metrics.likelihood.steps=8", "--config.eval.metrics.likelihood.bound_steps=8",
               f"--workdir={run}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(run / "previews/step_0000002.png").size == (480, 480)
    done = job("sample", f"--workdir={run}", "--num=30", "--steps=2")
    assert done.returncode == 0, done.stderr
    samples = np.load(run / "samples/samples.npz")["arr_0"]
    assert samples.shape == (30, 2) and samples.dtype == np.float32
    done = job("evaluate", f"--workdir={run}")
    assert done.returncode == 0, done.stderr
    assert set(json.loads((run / "evaluation.json").read_text())) == {"nll", "bound", "entropy", "settings"}
    done = job("train", "--config=configs/mixture.py:vdm", *flags, "--config.eval={}", f"--workdir={tmp_path}/none")
    assert done.returncode == 0, done.stderr
    assert refused_field(job("evaluate", f"--workdir={tmp_path}/none")) == "config.eval.metrics"


def test_debug_shows_the_traceback(workdir):
    done = job("sample", f"--workdir={workdir}", "--num=0", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr
