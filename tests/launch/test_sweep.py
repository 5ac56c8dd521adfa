"""Sweeps, started from the command line."""

import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from configs import moons
from diffusion.core import locks
from launch.points import name_points
from tests.jobs import ROOT, children, job
from tests.launch.fakes import calls, make_program
from tests.launch.runs import start_steps, write_sweep
from tests.refusals import refused_field

MOONS = "--config=configs/moons.py"
SHORT = ("--config.train.steps=20", "--config.optimizer.warmup=2", "--config.train.log_every=10")
SWEEP = """
from launch import vary
def sweep():
    return vary.over("optimizer.learning_rate", [1e-3, 2e-3])
def sweep_typo():
    return [{"optimizer.learning_rat": 1}]
def sweep_far():
    return [{"name": "../../far", "seed": 1}]
def sweep_shell():
    return [{"objective.name": "$(touch canary); `touch canary`"}]
def sweep_sampling():
    return vary.product(vary.over("sampler", ["ddim", "heun"]), vary.over("steps", [2, 3]))
def sweep_ends():
    return [{"seed": 1}, {"optimizer.learning_rate": 1e30}]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweeps") / "sweep.py"
    path.write_text(SWEEP)
    return str(path)


def table(workdir):
    with open(workdir / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def field_of(done):
    """Returns the field that an error names. On stderr the error may follow the line `checking N points`."""
    done.stderr = "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("checking "))
    return refused_field(done)


def test_dry_run_prints_the_commands_and_writes_nothing(file, tmp_path):
    done = job("launch.sweep", MOONS, *SHORT, f"--sweep={file}", f"--workdir={tmp_path}/new", "--dry_run", "--evaluate")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(line.startswith("$ python -m experiments.") for line in lines)
    assert "--config.optimizer.learning_rate=0.001 --workdir=" in lines[0] and "experiments.evaluate" in lines[1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--sweep={file}:typo"], "--sweep"),
        (["--sweep={file}:far"], "--sweep"),
        (["--sweep={file}:shell"], "--sweep"),
        (["--sweep={file}", "--jobs=0"], "--jobs"),
        (["--sweep={file}", "--retries=-1"], "--retries"),
        (["--sweep={file}", "--launcher=slrum"], "--launcher"),
        (["--sweep={file}", "--launcher=local:num_proceses=2"], "launcher.num_proceses"),
        (["--sweep={file}", "--launcher=slurm", "--evaluate"], "--evaluate"),
        (["--sweep={file}", "--config.train.stepz=3"], "--config.train.stepz"),
        (["--sweep={file}", "--checkpoint=runs/x"], "--config"),
        (["--sweep={file}", "--", "--num=3"], "--num=3"),
    ],
)
def test_invalid_command_lines_are_refused(flags, field, file, tmp_path):
    done = job("launch.sweep", MOONS, f"--workdir={tmp_path}/new", *(flag.format(file=file) for flag in flags))
    assert field_of(done).lstrip("-") == field.lstrip("-")
    assert not (tmp_path / "new").exists() and not (ROOT / "canary").exists()


@pytest.mark.parametrize(("launcher", "tool"), [("slurm", "sbatch"), ("gke:image=x:tpu=v5e:2x2", "kubectl")])
def test_missing_tool_is_reported(launcher, tool, file, tmp_path, monkeypatch):
    for other in {"git", "tar", "docker", "sbatch", "kubectl"} - {tool}:
        (tmp_path / other).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    done = job("launch.sweep", MOONS, *SHORT, f"--sweep={file}", f"--workdir={tmp_path}/new", f"--launcher={launcher}")
    assert field_of(done) == tool
    assert not (tmp_path / "new").exists()


def test_workdir_in_use_is_refused(file, tmp_path):
    with locks.hold(str(tmp_path), "workdir"):
        done = job("launch.sweep", MOONS, *SHORT, f"--sweep={file}", f"--workdir={tmp_path}")
    assert field_of(done) == "--workdir"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_workdir_of_another_sweep_is_refused(file, tmp_path):
    text = json.dumps({"config": "configs/moons.py", "overrides": {}, "points": []})
    (tmp_path / "sweep.json").write_text(text)
    done = job("launch.sweep", "--checkpoint=runs/x", f"--sweep={file}:sampling", f"--workdir={tmp_path}")
    assert field_of(done) == "--checkpoint"
    assert (tmp_path / "sweep.json").read_text() == text


def test_workdir_of_a_single_run_is_refused(file, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    done = job("launch.sweep", MOONS, *SHORT, f"--sweep={file}", f"--workdir={tmp_path}")
    assert field_of(done) == "--workdir"


@pytest.mark.parametrize("started_with", [2, 3])
def test_config_of_a_started_run_must_not_change(started_with, file, tmp_path):
    """The stored config lacks options with defaults, as if they were added after the run was started."""
    settings = {"config": "configs/moons.py", "overrides": {"optimizer.warmup": "2"}}
    write_sweep(tmp_path, {}, **settings)
    config = moons.get_config().to_dict()
    config["optimizer"] |= {"learning_rate": 1e-3, "warmup": started_with}
    (name,) = name_points([{"optimizer.learning_rate": 1e-3}])
    (tmp_path / name).mkdir()
    (tmp_path / name / "launch.json").write_text(json.dumps({"config": config}))
    flags = (MOONS, "--config.optimizer.warmup=2", f"--sweep={file}", f"--workdir={tmp_path}", "--dry_run")
    done = job("launch.sweep", *flags)
    if started_with == 2:
        assert done.returncode == 0, done.stderr
    else:
        assert field_of(done) == "config.optimizer.warmup"


@pytest.mark.slow
def test_sweep_from_beginning_to_end_and_again(file, tmp_path):
    flags = (MOONS, *SHORT, f"--sweep={file}", f"--workdir={tmp_path}", "--jobs=2")
    done = job("launch.sweep", *flags, "--evaluate", "--config.eval.metrics={'straightness': {'num': 8, 'steps': 2}}")
    assert done.returncode == 0, done.stderr + done.stdout
    rows = table(tmp_path)
    assert [row["state"] for row in rows] == ["done", "done"] and [row["step"] for row in rows] == ["20", "20"]
    assert [row["optimizer.learning_rate"] for row in rows] == ["0.001", "0.002"]
    assert all(float(row["loss"]) > 0 and float(row["path_curvature"]) >= 0 for row in rows)
    assert "<table" in (tmp_path / "results.html").read_text()
    about = json.loads((tmp_path / rows[1]["name"] / "launch.json").read_text())
    assert about["config"]["optimizer"]["learning_rate"] == 0.002 and len(about["commit"]) == 40
    status = job("launch.status", f"--workdir={tmp_path}")
    assert status.returncode == 0 and "2 done" in status.stdout
    # The same command does nothing more; other flags would make it another sweep.
    done = job("launch.sweep", *flags, "--evaluate", "--config.eval.metrics={'straightness': {'num': 8, 'steps': 2}}")
    assert done.returncode == 0 and "2 runs, 2 of them" in done.stdout
    assert [start_steps(tmp_path / row["name"]) for row in rows] == [[0], [0]]
    done = job("launch.sweep", *flags, "--config.seed=1")
    assert field_of(done) == "--overrides"


@pytest.mark.slow
def test_runs_may_end_differently(file, tmp_path):
    config = tmp_path / "impatient.py"
    config.write_text("from configs import moons\n\n\ndef get_config():\n    config = moons.get_config()\n"
                      "    config.train.patience = 2\n    return config\n")  # fmt: skip
    flags = ("launch.sweep", f"--config={config}", *SHORT, f"--sweep={file}:ends", f"--workdir={tmp_path}/runs")
    done = job(*flags)
    rows = table(tmp_path / "runs")
    assert [row["state"] for row in rows] == ["done", "diverged"], done.stdout + done.stderr
    assert done.returncode == 3 and "1 done" in done.stdout and "1 diverged" in done.stdout
    done = job(*flags)
    config.write_text(config.read_text().replace("patience = 2", "patience = 3"))
    assert field_of(job(*flags)) == "config.train.patience"
    assert done.returncode == 3 and "2 runs, 2 of them" in done.stdout  # a diverged run is not restarted


@pytest.mark.slow
def test_sampling_sweep(file, tmp_path):
    assert job("train", MOONS, *SHORT, f"--workdir={tmp_path}/run").returncode == 0
    flags = (f"--checkpoint={tmp_path}/run", f"--sweep={file}:sampling", f"--workdir={tmp_path}/sweep")
    done = job("launch.sweep", *flags, "--", "--num=20")
    assert done.returncode == 0, done.stderr
    rows = table(tmp_path / "sweep")
    assert [(row["sampler"], row["steps"], row["evaluations"]) for row in rows] == [
        ("ddim", "2", "2.0"), ("ddim", "3", "3.0"), ("heun", "2", "3.0"), ("heun", "3", "5.0"),
    ]  # fmt: skip
    page = (tmp_path / "sweep" / "results.html").read_text()
    assert page.count("iVBORw0KGgo") == 4
    done = job("launch.sweep", f"--checkpoint={tmp_path}/none", flags[1], f"--workdir={tmp_path}/other")
    assert done.returncode == 2, done.stderr
    assert not (tmp_path / "other").exists()


TINY = """
import ml_collections
from configs import digits, digits_edm, digits_flow

def get_config(objective="denoising"):
    config = {"denoising": digits, "flow": digits_flow, "edm": digits_edm}[objective].get_config()
    config.network = ml_collections.ConfigDict({"name": "mlp", "width": 32, "depth": 1})
    config.train.update({"batch_size": 16, "steps": STEPS, "log_every": 10, "preview_every": 0})
    config.checkpoint.every = 20
    config.optimizer.warmup = 5
    return config
"""
TWELVE = """
from launch import vary

def sweep():
    return vary.product(
        vary.over("config", ["CONFIG:denoising", "CONFIG:flow", "CONFIG:edm"]),
        vary.over("optimizer.learning_rate", [1e-3, 2e-3]),
        vary.over("ema.decays", [(0.9,), (0.99,)]),
    )
"""


def tiny(folder, steps):
    path = folder / "tiny.py"
    path.write_text(TINY.replace("STEPS", str(steps)))
    return path


def sweep_of(config, workdir, file):
    command = [sys.executable, "-m", "launch.sweep", f"--config={config}", f"--sweep={file}", f"--workdir={workdir}",
               "--jobs=2"]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_sweep_of_twelve_points_survives_two_kills(tmp_path):
    """Every point ends once, and every start resumes from the newest checkpoint."""
    config, path, workdir = tiny(tmp_path, 120), tmp_path / "sweep.py", tmp_path / "runs"
    path.write_text(TWELVE.replace("CONFIG", str(config)))
    for number in range(2):
        running = sweep_of(config, workdir, path)
        began, limit = time.monotonic(), random.uniform(5, 25)
        # The first iteration kills all processes, the second one only that of the sweep.
        while running.poll() is None and (time.monotonic() - began < limit or not list(workdir.glob("*/log.txt"))):
            time.sleep(0.1)
        alive = children(running.pid) if number == 0 else []
        running.kill()
        for child in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        running.wait()
    running = sweep_of(config, workdir, path)
    output = running.communicate(timeout=400)[0]
    assert running.returncode == 0, output
    rows = table(workdir)
    assert len(rows) == 12 and {row["state"] for row in rows} == {"done"} and {row["step"] for row in rows} == {"120"}
    assert all(row["loss"] and row["grad_norm"] for row in rows)
    for row in rows:
        folder = workdir / row["name"]
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        assert [event for event in events if event.get("code") == 0] == events[-1:]
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)) and steps[-1] == 120
        starts = start_steps(folder)
        assert starts == sorted(starts), starts


@pytest.mark.slow
def test_ctrl_c_makes_all_runs_save(file, tmp_path):
    workdir = tmp_path / "runs"
    running = sweep_of(tiny(tmp_path, 10**6), workdir, file)
    began = time.monotonic()
    while len(list(workdir.glob("*/metrics.jsonl"))) < 2 or not all(
        path.read_text() for path in workdir.glob("*/metrics.jsonl")
    ):
        assert running.poll() is None and time.monotonic() - began < 120
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    output = running.communicate(timeout=60)[0]
    assert running.returncode == 130, output
    assert {row["state"] for row in table(workdir)} == {"preempted"}
    saved = {path.parts[-3] for path in workdir.glob("*/checkpoints/[0-9]*")}
    assert saved == {row["name"] for row in table(workdir)}
    assert not any(locks.is_held(str(path.parent)) for path in workdir.glob("*/log.txt"))


@pytest.fixture
def checkout(tmp_path):
    """Copies the code to a new repository without uncommitted changes."""
    root = tmp_path / "checkout"
    for part in ("diffusion", "experiments", "launch", "configs"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    git = ("git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "all")):
        subprocess.run([*git, *words], check=True)
    return root


@pytest.mark.slow
def test_sweep_on_a_cluster(checkout, file, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    make_program(programs, "sbatch", "print('Submitted batch job 1')")
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}

    def launch(module, *flags):
        return subprocess.run([sys.executable, "-m", module, *flags], cwd=checkout, env=environment, text=True,
                              capture_output=True)  # fmt: skip

    workdir = tmp_path / "shared" / "lr"
    flags = (MOONS, *SHORT, f"--sweep={file}", f"--workdir={workdir}", "--launcher=slurm:partition=gpu")
    done = launch("launch.sweep", *flags, "--dry_run")
    assert done.returncode == 0 and "$ sbatch --" in done.stdout and not workdir.exists(), done.stderr
    done = launch("launch.sweep", *flags)
    assert done.returncode == 0 and "2 runs submitted" in done.stdout, done.stderr
    (called,) = calls(programs, "sbatch")
    assert "--partition=gpu" in called and any(word.startswith("--array=0-1") for word in called)
    assert "2 submitted" in launch("launch.status", f"--workdir={workdir}").stdout
    done = launch("launch.sweep", *flags)
    assert done.returncode == 0 and "nothing to submit: 2 submitted" in done.stdout
    assert len(calls(programs, "sbatch")) == 1
    # Submitted runs are not submitted twice; a run whose folder was deleted is.
    done = launch("launch.sweep", *flags, "--again")
    assert done.returncode == 0 and "nothing to submit: 2 submitted" in done.stdout
    shutil.rmtree(next(path.parent for path in workdir.glob("*/launch.json")))
    done = launch("launch.sweep", *flags)
    assert done.returncode == 0 and "1 runs submitted" in done.stdout, done.stderr
    (checkout / "configs" / "moons.py").write_text("# \n" + (checkout / "configs" / "moons.py").read_text())
    done = launch("launch.run", "--launcher=slurm", "--", "train", MOONS, f"--workdir={tmp_path}/one")
    assert refused_field(done) == str(checkout)
