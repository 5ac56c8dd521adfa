"""The names of classes: stored with a run, compared when it resumes, and used to draw samples."""

import contextlib
import dataclasses
import json
import unicodedata

import numpy as np
import pytest
from PIL import Image

import diffusion as df
from diffusion.core.build import build
from diffusion.core.types import ArraySpec, ConditionSpec, Spec, class_labels
from diffusion.pipelines.build_training import build_training, check_training
from diffusion.pipelines.conditions import numbers_of
from diffusion.pipelines.config import resolve
from diffusion.pipelines.evaluation import build_metrics
from diffusion.pipelines.run import open_run
from diffusion.pipelines.stored import config_and_spec
from diffusion.training import trainer
from diffusion.training.trainer import check_same
from tests.jobs import job, one_line
from tests.refusals import refused

NAMES = ("bird", "cät, black", "dog")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run on one device with a folder of three classes."""
    root = tmp_path_factory.mktemp("images")
    for name in NAMES:
        (root / name).mkdir()
        Image.new("RGB", (4, 4)).save(root / name / "1.png")
    return resolve({
        "data": {"name": "folder", "path": str(root), "size": 4},
        "objective": "denoising",
        "network": {"name": "mlp", "width": 8, "depth": 1},
        "train": {"steps": 2, "batch_size": 8},
        "sampler": {"name": "ddim", "steps": 1},
    })  # fmt: skip


@pytest.fixture(scope="module")
def workdir(config, tmp_path_factory, mesh_of):
    """A run, which has said what its classes are."""
    path = str(tmp_path_factory.mktemp("runs") / "named")
    with pytest.MonkeyPatch.context() as patch:
        said = []
        patch.setattr(trainer.logger, "info", said.append)
        df.Trainer(**{**build_training(config, path), "mesh": mesh_of(1, 1, 1)}, workdir=path).fit()
    assert "3 classes: 0 bird, 1 cät, black, 2 dog" in said
    return path


def test_samples_are_drawn_by_name(workdir):
    run = open_run(workdir)
    assert run.spec.class_names == NAMES
    spelled = unicodedata.normalize("NFD", NAMES[1])
    assert run.conditions(4, [spelled, 0])["label"].tolist() == [1, 0, 1, 0]
    assert run.conditions(2, "dog")["label"].tolist() == [2, 2]
    x = run.sample(num=2, labels=["dog"], steps=1)
    np.testing.assert_array_equal(x, run.sample(num=2, labels=[2], steps=1))
    with refused("labels") as caught:
        run.sample(labels=["dogs"])
    assert "'dog'" in caught.value.problem
    with refused("labels"):
        numbers_of(["dog"], ())


def test_other_classes_are_refused(config, workdir, tmp_path):
    """By `--check` and by the run, before anything is written."""
    check_training(build_training(config, workdir), workdir)
    for name in ("ant", "bird", "dog"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "1.png")
    moved = {**config, "data": {**config["data"], "path": str(tmp_path)}}
    with refused("data") as caught:
        build_training(moved, workdir)
    assert f"-{NAMES[1]}" in caught.value.problem and "+ant" in caught.value.problem


@pytest.mark.slow
def test_the_job_prints_classes_and_takes_their_names(config, workdir, tmp_path):
    flags = (f"--workdir={workdir}", "--num=2", "--steps=1", "--out_format=png", f"--out={tmp_path}")
    done = job("sample", *flags, '--labels=dog,"cät, black"')
    assert done.returncode == 0 and "0 bird, 1 cät, black, 2 dog" in done.stdout, done.stderr
    assert (tmp_path / "labels.csv").read_text().splitlines()[1:] == ["000000.png,2,dog", '000001.png,1,"cät, black"']
    assert one_line(job("sample", *flags, "--labels=cow")).startswith("error: --labels: there is no class 'cow'")


def test_names_are_listed_and_counted():
    many = Spec(ArraySpec((2,), "points"), class_labels(1000, [f"c{label}" for label in range(1000)]))
    assert many.classes(2) == "0 c0, 1 c1, ... (998 more)"
    with refused("class_names"):
        ConditionSpec("label", num_classes=2, class_names=("a",))


def test_held_out_data_have_the_same_classes(config, tmp_path):
    """A class that is missing there would give the others its label."""
    (tmp_path / "dog").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "dog" / "1.png")
    source = build("data", config["data"])
    for path, fails in ((config["data"]["path"], False), (str(tmp_path), True)):
        section = {"data": {**config["data"], "path": path}, "metrics": {}}
        with refused("eval.data") if fails else contextlib.nullcontext() as caught:
            build_metrics({"eval": section}, source)
    assert "bird" in caught.value.problem


def test_check_refuses_what_resuming_refuses(config, workdir, tmp_path):
    """Fewer steps than done, other arrays, more examples; captions, which a trainer refuses itself."""

    def check(section, **options):
        changed = {**config, section: {**config[section], **options}}
        return check_training(build_training(changed, workdir), workdir)

    assert "2 steps" in check("train")
    with refused("train.steps"):
        check("train", steps=1)
    with refused("workdir"):
        check("ema", decays=(0.5, 0.9))
    for name in NAMES:
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (4, 4)).save(tmp_path / name / f"{number}.png")
            (tmp_path / name / f"{number}.txt").write_text("text")
    with refused("data"):
        check("data", path=str(tmp_path))
    with refused("data.captions"):
        captioned = {**config, "data": {**config["data"], "path": str(tmp_path), "captions": True}}
        check_training(build_training(captioned, str(tmp_path / "new")), str(tmp_path / "new"))


def meta(*names, order="number", **label):
    spec = dataclasses.asdict(Spec(ArraySpec((2,), "points"), class_labels(len(names), names)))
    spec["conditions"]["label"] |= label
    return json.loads(json.dumps({"config": {"data": {"name": "folder", "class_order": order}}, "spec": spec}))


def earlier(*names):
    """Returns the `meta` of a run from before names were stored and classes could be ordered by value."""
    stored = meta(*names)
    del stored["spec"]["conditions"]["label"]["class_names"], stored["config"]["data"]["class_order"]
    return stored


@pytest.mark.parametrize("now", [("a", "c"), ("b", "a"), ("a", "b", "c"), ("a",)])
def test_any_change_of_the_class_list_is_refused(now):
    check_same(meta("a", "b"), meta("a", "b"))
    with refused("data"):
        check_same(meta("a", "b"), meta(*now))


def test_runs_and_sources_without_names():
    check_same(meta("a", "b"), meta("a", "b", class_names=()))
    check_same(meta("a", "b", class_names=()), meta("a", "b"))
    check_same(earlier("a", "b"), meta("a", "b"))
    with refused("data"):
        check_same(earlier("a", "b"), meta("a", "b", "c"))


def test_earlier_runs_have_the_order_of_names():
    """They neither resume with another order nor are read with it."""
    with refused("data.class_order"):
        check_same(earlier("0", "10", "2"), meta("0", "2", "10"))
    check_same(earlier("0", "10", "2"), meta("0", "10", "2", order="name"))
    check_same(earlier("0", "1", "2"), meta("0", "1", "2"))
    with refused("data.class_order"):  # the first checkpoints had no conditions
        check_same({**earlier("0", "10", "2"), "spec": {"shape": [2], "num_classes": 3}}, meta("0", "2", "10"))
    for stored, order in ((earlier("0", "10", "2"), "name"), (meta("0", "2", "10"), "number")):
        stored["config"] = {"version": 2, "data": {"name": "folder", "path": "x", "size": 4}, "objective": "denoising",
                            "network": "mlp", "train": {}}  # fmt: skip
        config, _ = config_and_spec(stored)
        assert config["data"]["class_order"] == config["eval"]["data"]["class_order"] == order
