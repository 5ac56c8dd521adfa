"""Students of trained models: how a teacher is read, kept, and refused."""

import json
import pathlib
import runpy
import shutil

import jax
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import InputError
from diffusion.pipelines.build_training import meta_of, training
from diffusion.pipelines.model import model_of
from diffusion.pipelines.run import open_run
from diffusion.training import trainer
from diffusion.training.checkpoint import Checkpoints
from tests.jobs import ROOT, job, one_line

TINY = {"name": "mlp", "width": 8, "depth": 1}


def config_of(name, variant=None, *, steps=2, teacher=None, **sections):
    """A config of the house with a network that compiles in seconds."""
    get_config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
    config = (get_config(variant) if variant else get_config()).to_dict()
    config["network"] = {**TINY, "scalar_conditions": config["network"].get("scalar_conditions", ())}
    config["train"] |= {"steps": steps, "batch_size": 16, "preview_every": 0}
    config["optimizer"] |= {"warmup": 1, "schedule": "constant"}
    config["checkpoint"] = {"every": 2, "keep": 3}
    if teacher is not None:
        config["objective"]["teacher"] = str(teacher)
    for name, section in sections.items():
        config[name] |= section
    return config


def train(config, workdir):
    """What the job does, without pictures."""
    source = build("data", config["data"], field="data")
    meta, teacher = meta_of(config, source.spec, str(workdir))
    network, objective = model_of(meta)
    return trainer.train(
        str(workdir), source=source, network=network, objective=objective, **training(config), meta=meta,
        teacher=teacher,
    )  # fmt: skip


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """Two steps of EDM on digits."""
    path = tmp_path_factory.mktemp("runs") / "teacher"
    train(config_of("digits_edm"), path)
    return path


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """Two steps of consistency distillation from it."""
    path = tmp_path_factory.mktemp("runs") / "student"
    train(config_of("digits_consistency", "cd", teacher=teacher), path)
    return path


def test_a_student_begins_with_its_teachers_average(teacher):
    config = config_of("digits_consistency", "cd", teacher=teacher)
    spec = build("data", "digits").spec
    meta, params = meta_of(config, spec, str(teacher / "none"))
    network, objective = model_of(json.loads(json.dumps(meta)))
    assert meta["teacher"]["step"] == 2 and meta["teacher"]["ema"] == "0.998"
    state = objective.init(network, jax.random.key(0), params)
    average = open_run(str(teacher)).params["net"]
    for name in (state["net"], state["teacher"]["net"], state["target"]):
        jax.tree.map(np.testing.assert_array_equal, name, average)


def test_a_run_keeps_its_teacher(student, teacher, tmp_path):
    """It goes on bit for bit, and samples, when the teacher has trained on or is gone."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    expected = train(config_of("digits_consistency", "cd", steps=4, teacher=teacher), whole)
    gone = tmp_path / "teacher"
    shutil.copytree(teacher, gone)
    train(config_of("digits_consistency", "cd", steps=2, teacher=gone), cut)
    shutil.rmtree(gone)
    state = train(config_of("digits_consistency", "cd", steps=4, teacher=gone), cut)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    run = open_run(str(cut))
    assert run.params.keys() == {"net"} and run.step == 4
    drawer = run.drawer(sampler=run.config["sampler"], guidance=run.config["guidance"])
    assert np.isfinite(drawer(run.params, np.arange(8), 8, seed=0)).all()
    with pytest.raises(InputError, match=r"^objective.teacher: is .*elsewhere.*, but the workdir was trained with"):
        train(config_of("digits_consistency", "cd", steps=4, teacher=tmp_path / "elsewhere"), cut)


def test_a_student_with_a_teacher_can_be_a_teacher(student, tmp_path):
    """Of its own kind it is refused, for it does not give the mean; its own teacher is built again all the same."""
    with pytest.raises(InputError, match=r"^objective.teacher: is a few-step model itself"):
        train(config_of("digits_consistency", "cd", teacher=student), tmp_path / "second")
    assert not (tmp_path / "second").exists()


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "flow"
    train(config_of("digits_flow"), path)
    return path


def broken(teacher, to):
    """A copy whose newest checkpoint lost an array on the way."""
    shutil.copytree(teacher, to)
    newest = Checkpoints(str(to), read_only=True).latest()
    for file in sorted((pathlib.Path(to) / "checkpoints" / str(newest) / "ema").rglob("*")):
        if file.is_file():
            file.unlink()
    return to


REFUSED = {
    "no teacher": (("digits_consistency", "cd"), {"teacher": "absent"}, "objective.teacher.workdir: .*does not exist"),
    "no name": (("digits_consistency", "cd"), {"objective": {"teacher": 5}}, "objective.teacher: must be the workdir"),
    "another schedule": (("digits_consistency", "cd"), {"teacher": "flow"}, "objective.teacher: has another schedule"),
    "another width": (
        ("digits_consistency", "cd"),
        {"teacher": "teacher", "network": {"width": 16}},
        "objective.teacher: has another network: .*bias1 is .* there and .* here",
    ),
    "other data": (
        ("digits_reflow", "reflow"),
        {"teacher": "flow", "data": {"name": "toy", "kind": "moons"}},
        "objective.teacher: .*was trained on data of another kind",
    ),
    "half written": (
        ("digits_consistency", "cd"), {"teacher": "broken"}, "objective.teacher.workdir: .* is damaged .*no other",
    ),
    "no second time": (("digits_mean_flow",), {"network": {"scalar_conditions": ()}}, "network.conditions: lacks 'r'"),
    "no told guidance": (
        ("digits_lcm",), {"teacher": "ddpm_v", "network": {"scalar_conditions": ()}}, "network.conditions: lacks 'guidance'",
    ),
    "no steps": (("digits_mean_flow",), {"train": {"steps": 0}}, "train.steps: must be at least 1, got 0"),
    "no rounds": (("digits_progressive",), {"teacher": "ddpm_v", "objective": {"round_steps": 0}},
                  "objective.round_steps: must be at least 1, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name, teacher, flow, tmp_path):
    config, options, message = REFUSED[name]
    options = dict(options)
    if "teacher" in options:
        made = {"teacher": lambda: teacher, "flow": lambda: flow, "ddpm_v": lambda: ddpm_v(tmp_path),
                "absent": lambda: tmp_path / "absent",
                "broken": lambda: broken(teacher, tmp_path / "broken")}  # fmt: skip
        options["teacher"] = made[options["teacher"]]()
    with pytest.raises(InputError, match=f"^{message}"):
        train(config_of(*config, **options), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def ddpm_v(folder):
    train(config_of("digits_ddpm_v"), folder / "ddpm_v")
    return folder / "ddpm_v"


def test_the_job_says_it_in_one_line(tmp_path):
    """In a process of its own: exit code 2, and nothing written."""
    done = job("train", "--config=configs/digits_consistency.py:cd", f"--workdir={tmp_path}/run",
               f"--config.objective.teacher={tmp_path}/none")  # fmt: skip
    assert "objective.teacher.workdir: " in one_line(done) and "does not exist" in done.stderr
    assert not (tmp_path / "run").exists()
