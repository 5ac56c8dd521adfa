"""Sweeps as a user starts them."""

import contextlib
import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from launch import locks
from tests.jobs import ROOT, children, job, one_line
from tests.launch.fakes import calls, program

MOONS = "--config=configs/moons.py"
SHORT = ("--config.train.steps=20", "--config.optimizer.warmup=2", "--config.train.log_every=10")
SWEEP = """
from launch import vary
def sweep():
    return vary.over("optimizer.learning_rate", [1e-3, 2e-3])
def sweep_nothing():
    return []
def sweep_typo():
    return [{"optimizer.learning_rat": 1}]
def sweep_twice():
    return [{"seed": 1}, {"seed": 1}]
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


def starts(folder):
    """The steps that each start of a run has begun with."""
    told = (folder / "log.txt").read_text()
    return [int(step.replace(",", "")) for step in re.findall(r"going on from step ([\d,]+)|from the start", told)
            if step] + [0] * len(re.findall("from the start", told))  # fmt: skip


def test_a_dry_run_prints_and_writes_nothing(file, tmp_path):
    done = job("launch.sweep", MOONS, *SHORT, f"--sweep={file}", f"--workdir={tmp_path}/new", "--dry_run", "--evaluate")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 4 and all(line.startswith("$ python -m experiments.") for line in lines)
    assert "--config.optimizer.learning_rate=0.001 --workdir=" in lines[0] and "experiments.evaluate" in lines[1]
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sweep={file}:nothing"], "--sweep: .*:nothing yields nothing"),
        (
            ["--sweep={file}:typo"],
            "--sweep: point .*: --config.optimizer.learning_rat: the config has no ",
        ),
        (["--sweep={file}:twice"], "--sweep: points 0 and 1 are the same"),
        (["--sweep={file}:far"], r"--sweep: '../../far': wants letters"),
        (["--sweep={file}:shell"], r"--sweep: point .*: objective.name: no '\$\(touch canary\)"),
        (["--sweep={file}:such"], r"--sweep: .* has no sweep_such\(\); there are: sweep, sweep_"),
        (["--sweep={file}", "--jobs=0"], "--jobs: must be at least 1, got 0"),
        (["--sweep={file}", "--retries=-1"], "--retries: must be at least 0, got -1"),
        (["--sweep={file}", "--launcher=slrum"], "--launcher: no 'slrum'; one of: gke, local, mig, slurm, tpu_vm"),
        (
            ["--sweep={file}", "--launcher=local:num_proceses=2"],
            "launcher.num_proceses: .* did you mean 'num_processes'",
        ),
        (["--sweep={file}", "--launcher=local:gpus=0"], "launcher.gpus: must be at least 1, got 0"),
        (["--sweep={file}", "--launcher=slurm", "--evaluate"], "--evaluate: is for runs on this machine"),
        (["--sweep={file}", "--config.train.stepz=3"], "--config.train.stepz: the config has no 'stepz'"),
        (["--sweep={file}", "--checkpoint=runs/x"], "--config: or --checkpoint: give one of the two"),
        (["--sweep={file}", "--", "--num=3"], "--num=3: stands after --, which is for experiments.sample"),
    ],
)
def test_what_is_refused(flags, message, file, tmp_path):
    done = job("launch.sweep", MOONS, f"--workdir={tmp_path}/new", *(flag.format(file=file) for flag in flags))
    assert re.search(message, one_line_of(done))
    assert not (tmp_path / "new").exists() and not (ROOT / "canary").exists()


def one_line_of(done):
    """Of what is refused, perhaps after the line that tells of the check."""
    done.stderr = re.sub(r"^checking \d+ points\n", "", done.stderr)
    return one_line(done)


@pytest.mark.parametrize(("launcher", "tool"), [("slurm", "sbatch"), ("gke:image=x:tpu=v5e:2x2", "kubectl")])
def test_a_launcher_whose_tool_is_missing(launcher, tool, file, tmp_path, monkeypatch):
    for other in {"git", "tar", "docker", "sbatch", "kubectl"} - {tool}:
        (tmp_path / other).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    done = job("launch.sweep", MOONS, *SHORT, f"--sweep={file}", f"--workdir={tmp_path}/new", f"--launcher={launcher}")
    assert f"error: {tool}: is not on the PATH; " in one_line_of(done)
    assert not (tmp_path / "new").exists()


def test_a_workdir_in_use(file, tmp_path):
    with locks.hold(str(tmp_path), "workdir"):
        done = job("launch.sweep", MOONS, *SHORT, f"--sweep={file}", f"--workdir={tmp_path}")
    assert "--workdir: " in one_line_of(done) and "is in use by another" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_folder_of_another_sweep_is_not_sampled_into(file, tmp_path):
    text = json.dumps({"config": "configs/moons.py", "overrides": {}, "points": []})
    (tmp_path / "sweep.json").write_text(text)
    done = job("launch.sweep", "--checkpoint=runs/x", f"--sweep={file}:sampling", f"--workdir={tmp_path}")
    assert "--checkpoint: is 'runs/x', but the sweep in" in one_line_of(done)
    assert (tmp_path / "sweep.json").read_text() == text


def test_a_workdir_of_something_else(file, tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    done = job("launch.sweep", MOONS, *SHORT, f"--sweep={file}", f"--workdir={tmp_path}")
    assert "is a run's; a sweep wants a folder of its own" in one_line_of(done)


@pytest.mark.slow
def test_a_sweep_from_begin_to_end_and_again(file, tmp_path):
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
    # Started again it does nothing; with other flags it is another sweep.
    done = job("launch.sweep", *flags, "--evaluate", "--config.eval.metrics={'straightness': {'num': 8, 'steps': 2}}")
    assert done.returncode == 0 and "2 runs, 2 of them ended before" in done.stdout
    assert [starts(tmp_path / row["name"]) for row in rows] == [[0], [0]]
    done = job("launch.sweep", *flags, "--config.seed=1")
    assert "--overrides: is " in one_line_of(done)


@pytest.mark.slow
def test_each_run_ends_in_its_own_way(file, tmp_path):
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
    assert "config.train.patience: is 3, but " in one_line_of(job(*flags))
    assert done.returncode == 3 and "2 of them ended before" in done.stdout  # what has diverged would diverge again


@pytest.mark.slow
def test_sampling_in_one_process(file, tmp_path):
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
    assert done.returncode == 2 and "does not exist" in done.stderr
    assert not (tmp_path / "other").exists()


TINY = """
import ml_collections
from configs import digits, digits_edm, digits_flow

def get_config(objective="ddpm"):
    config = {"ddpm": digits, "flow": digits_flow, "edm": digits_edm}[objective].get_config()
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
        vary.over("config", ["CONFIG:ddpm", "CONFIG:flow", "CONFIG:edm"]),
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
def test_twelve_points_killed_twice(tmp_path):
    """Every point ends once, and what a checkpoint has is not trained again."""
    config, path, workdir = tiny(tmp_path, 120), tmp_path / "sweep.py", tmp_path / "runs"
    path.write_text(TWELVE.replace("CONFIG", str(config)))
    for number in range(2):
        running = sweep_of(config, workdir, path)
        began, limit = time.monotonic(), random.uniform(5, 25)
        # The first kill takes all processes, the second the sweep's alone.
        while running.poll() is None and (time.monotonic() - began < limit or not list(workdir.glob("*/log.txt"))):
            time.sleep(0.1)
        alive = children(running.pid) if number == 0 else []
        running.kill()
        for child in alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        running.wait()
    running = sweep_of(config, workdir, path)
    told = running.communicate(timeout=400)[0]
    assert running.returncode == 0, told
    rows = table(workdir)
    assert len(rows) == 12 and {row["state"] for row in rows} == {"done"} and {row["step"] for row in rows} == {"120"}
    assert all(row["loss"] and row["grad_norm"] for row in rows)
    for row in rows:
        folder = workdir / row["name"]
        events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        assert [event for event in events if event.get("code") == 0] == events[-1:]
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert steps == sorted(set(steps)) and steps[-1] == 120
        told = (folder / "log.txt").read_text()
        begun = [told.find("from the start"), told.rfind("from the start")]
        saved = told.find("going on from step")
        assert begun[0] == begun[1] or saved == -1 or saved > begun[1], told


@pytest.mark.slow
def test_ctrl_c_has_all_save(file, tmp_path):
    workdir = tmp_path / "runs"
    running = sweep_of(tiny(tmp_path, 10**6), workdir, file)
    began = time.monotonic()
    while len(list(workdir.glob("*/metrics.jsonl"))) < 2 or not all(
        path.read_text() for path in workdir.glob("*/metrics.jsonl")
    ):
        assert running.poll() is None and time.monotonic() - began < 120
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    told = running.communicate(timeout=60)[0]
    assert running.returncode == 130, told
    assert {row["state"] for row in table(workdir)} == {"preempted"}
    saved = {path.parts[-3] for path in workdir.glob("*/checkpoints/[0-9]*")}
    assert saved == {row["name"] for row in table(workdir)}
    assert not any(locks.is_held(str(path.parent)) for path in workdir.glob("*/log.txt"))


@pytest.fixture
def checkout(tmp_path):
    """The code in a repository of its own, with nothing that is not committed."""
    root = tmp_path / "checkout"
    for part in ("diffusion", "experiments", "launch", "configs"):
        shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
    git = ("git", "-C", root, "-c", "user.name=a", "-c", "user.email=a@b")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "all")):
        subprocess.run([*git, *words], check=True)
    return root


@pytest.mark.slow
def test_a_sweep_on_a_cluster(checkout, file, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs, "sbatch", "print('Submitted batch job 1')")
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
    # What is on its way is not submitted twice; a run whose folder is gone is new.
    done = launch("launch.sweep", *flags, "--again")
    assert done.returncode == 0 and "nothing to submit: 2 submitted" in done.stdout
    shutil.rmtree(next(path.parent for path in workdir.glob("*/launch.json")))
    done = launch("launch.sweep", *flags)
    assert done.returncode == 0 and "1 runs submitted" in done.stdout, done.stderr
    (checkout / "configs" / "moons.py").write_text("# \n" + (checkout / "configs" / "moons.py").read_text())
    done = launch("launch.run", "--launcher=slurm", "--", "train", MOONS, f"--workdir={tmp_path}/one")
    assert "has changes that are in no commit" in one_line(done)
