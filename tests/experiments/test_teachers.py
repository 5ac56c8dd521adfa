"""Distillation from a trained model: how the teacher is read, stored with the student, and refused."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.pipelines.build_training import meta_of, training
from diffusion.pipelines.config import read_config, resolve
from diffusion.pipelines.model import model_of
from diffusion.pipelines.run import open_run
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.trainer import Trainer
from tests.jobs import ROOT, job
from tests.refusals import refused, refused_field

TINY = {"name": "mlp", "width": 8, "depth": 1}


def config_of(name, variant=None, *, steps=2, teacher=None, **sections):
    """Returns a shipped config with a network that compiles in seconds, and with options of sections replaced."""
    config = read_config(str(ROOT / "configs" / f"{name}.py") + (f":{variant}" if variant else ""))
    config["network"] = {**TINY, "scalar_conditions": config["network"].get("scalar_conditions", ())}
    config["train"] |= {"steps": steps, "batch_size": 16, "preview_every": 0}
    config["optimizer"] |= {"warmup": 1, "schedule": "constant"}
    config["checkpoint"] = {"every": 2, "keep": 3}
    if teacher is not None:
        config["objective"]["teacher"] = str(teacher)
    for name, section in sections.items():
        config[name] |= section
    return resolve(config)


def train(config, workdir):
    """Trains as the job does, but without previews, signal handlers and the watchdog."""
    source = build("data", config["data"], field="data")
    meta, teacher = meta_of(config, source.spec, str(workdir))
    network, objective, *_ = model_of(meta)
    return Trainer(
        source, network, objective, **training(config), workdir=str(workdir), meta=meta, teacher=teacher
    ).fit()


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of two steps of EDM on digits."""
    path = tmp_path_factory.mktemp("runs") / "teacher"
    train(config_of("digits_edm"), path)
    return path


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """A run of two steps of consistency distillation from it."""
    path = tmp_path_factory.mktemp("runs") / "student"
    train(config_of("digits_consistency", "cd", teacher=teacher), path)
    return path


def test_a_student_starts_from_its_teachers_average(teacher):
    config = config_of("digits_consistency", "cd", teacher=teacher)
    spec = build("data", "digits").spec
    meta, params = meta_of(config, spec, str(teacher / "none"))
    network, objective, *_ = model_of(json.loads(json.dumps(meta)))
    assert meta["teacher"]["step"] == 2 and meta["teacher"]["ema"] == "0.998"
    state = objective.init(network, jax.random.key(0), params)
    average = open_run(str(teacher)).params["net"]
    for name in (state["net"], state["teacher"]["net"], state["target"]):
        jax.tree.map(np.testing.assert_array_equal, name, average)


@pytest.mark.slow
def test_a_run_keeps_its_teacher(teacher, tmp_path):
    """Resumes bit for bit, and samples, after the teacher's workdir has been deleted."""
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    expected = train(config_of("digits_consistency", "cd", steps=4, teacher=teacher), uninterrupted)
    deleted = tmp_path / "teacher"
    shutil.copytree(teacher, deleted)
    train(config_of("digits_consistency", "cd", steps=2, teacher=deleted), resumed)
    shutil.rmtree(deleted)
    state = train(config_of("digits_consistency", "cd", steps=4, teacher=deleted), resumed)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    run = open_run(str(resumed))
    assert run.params.keys() == {"net"} and run.step == 4
    assert np.isfinite(run.sample(8, range(8))).all()
    with refused("objective.teacher"):
        train(config_of("digits_consistency", "cd", steps=4, teacher=tmp_path / "elsewhere"), resumed)


@pytest.mark.slow
def test_a_few_step_model_is_refused_as_a_teacher(student, tmp_path):
    """It does not predict the posterior mean. Reading it also builds its own teacher."""
    with refused("objective.teacher"):
        train(config_of("digits_consistency", "cd", teacher=student), tmp_path / "second")
    assert not (tmp_path / "second").exists()


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "flow"
    train(config_of("digits_flow"), path)
    return path


def broken(teacher, to):
    """Copies a run and removes the averaged parameters from its newest checkpoint."""
    shutil.copytree(teacher, to)
    newest = Checkpoints(str(to), read_only=True).latest()
    for file in sorted((pathlib.Path(to) / "checkpoints" / str(newest) / "ema").rglob("*")):
        if file.is_file():
            file.unlink()
    return to


CD = ("digits_consistency", "cd")
REFUSED = {
    "no such teacher": (CD, {"teacher": "absent"}, "objective.teacher.workdir"),
    "not a workdir": (CD, {"objective": {"teacher": 5}}, "objective.teacher"),
    "another schedule": (CD, {"teacher": "flow"}, "objective.teacher"),
    "another width": (CD, {"teacher": "teacher", "network": {"width": 16}}, "objective.teacher"),
    "other data": (
        ("digits_reflow", "reflow"),
        {"teacher": "flow", "data": {"name": "toy", "kind": "moons"}},
        "objective.teacher",
    ),
    "a corrupt checkpoint": (CD, {"teacher": "broken"}, "objective.teacher.workdir"),
    "a network without a target time": (
        ("digits_mean_flow",), {"network": {"scalar_conditions": ()}}, "network.scalar_conditions"
    ),
    "a network without a guidance embedding": (
        ("digits_lcm",), {"teacher": "ddpm_v", "network": {"scalar_conditions": ()}}, "network.scalar_conditions",
    ),
    "no steps": (("digits_mean_flow",), {"train": {"steps": 0}}, "train.steps"),
    "no rounds": (
        ("digits_progressive",), {"teacher": "ddpm_v", "objective": {"round_steps": 0}}, "objective.round_steps"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, request, tmp_path):
    config, options, field = REFUSED[name]
    options = dict(options)
    if "teacher" in options:
        made = {"absent": lambda: tmp_path / "absent",
                "broken": lambda: broken(request.getfixturevalue("teacher"), tmp_path / "broken")}  # fmt: skip
        chosen = options["teacher"]
        options["teacher"] = made[chosen]() if chosen in made else request.getfixturevalue(chosen)
    with refused(field):
        train(config_of(*config, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def ddpm_v(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "ddpm_v"
    train(config_of("digits_ddpm_v"), path)
    return path


def test_the_job_reports_a_missing_teacher_in_one_line(tmp_path):
    done = job("train", "--config=configs/digits_consistency.py:cd", f"--workdir={tmp_path}/run",
               f"--config.objective.teacher={tmp_path}/none")  # fmt: skip
    assert refused_field(done) == "objective.teacher.workdir"
    assert not (tmp_path / "run").exists()
