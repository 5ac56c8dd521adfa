"""Evaluation during training: the values, the lines, the best checkpoint, and resuming."""

import json
import types

import numpy as np
import pytest

from diffusion.pipelines.build_training import build_training, check_training
from diffusion.pipelines.config import resolve
from diffusion.pipelines.generator import Generator
from diffusion.pipelines.run import open_run
from diffusion.training.resilience.guards import Diverged
from diffusion.training.trainer import Trainer
from tests.refusals import refused

CONFIG = {
    "data": "digits",
    "objective": "flow_matching",
    "network": {"name": "mlp", "width": 8, "depth": 1},
    "optimizer": {"learning_rate": 1e-2},
    "ema": {"decays": (0.5,)},
    "train": {"steps": 6, "batch_size": 16, "log_every": 4},
    "checkpoint": {"every": 2, "keep": 1, "keep_best": "eval/energy_distance_ratio"},
    "sampler": {"steps": 2},
    "eval": {
        "data": {"name": "digits", "split": "test"},
        "metrics": {
            "energy_distance": {"num": 24}, "svc_accuracy": {"num": 24, "guidance": 1.0}, "held_out_loss": {"num": 20},
        },
        "every": 2,
        "batch_size": 16,
    },
}  # fmt: skip


def config_of(**sections):
    changed = {name: {**CONFIG[name], **options} for name, options in sections.items()}
    return resolve({**CONFIG, **changed})


def train(workdir, **sections):
    return Trainer(**build_training(config_of(**sections), str(workdir)), workdir=str(workdir)).fit()


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    train(path)
    return path


def test_values_are_those_of_the_evaluation_job(workdir):
    """One line per step, with the means of the window where it ends; images are drawn once for both metrics."""
    found = lines(workdir)
    assert [line["step"] for line in found] == [2, 4, 6]
    assert [("loss" in line) for line in found] == [False, True, True]
    run = open_run(str(workdir))
    expected = run.evaluate(batch_size=16)
    assert len(expected) == 9 and run.step == 6
    for name, value in expected.items():
        assert found[-1][f"eval/{name}"] == pytest.approx(value, rel=1e-6), name
    assert len({line["eval/energy_distance_ratio"] for line in found}) == 3


@pytest.mark.parametrize("mode", ["min", pytest.param("max", marks=pytest.mark.slow)])
def test_the_best_checkpoint_is_kept(workdir, tmp_path, mode):
    """And a run that was stopped and resumed writes the same lines."""
    ratios = {line["step"]: line["eval/energy_distance_ratio"] for line in lines(workdir)}
    best = (min if mode == "min" else max)(ratios, key=ratios.get)
    train(tmp_path, train={"steps": 4}, checkpoint={"keep_best_mode": mode})
    train(tmp_path, checkpoint={"keep_best_mode": mode})
    kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted({best, 6})
    clean = [[{**line, "images_per_second": 0} for line in lines(path)] for path in (workdir, tmp_path)]
    assert clean[0] == clean[1]


def test_samples_that_are_not_finite(workdir, monkeypatch, caplog):
    """A training logs how many, and their metrics are NaN; the evaluation of a run ends with an error."""
    run, real = open_run(str(workdir)), Generator.batches
    broken = lambda *given, **options: ((np.nan * x, cond) for x, cond in real(*given, **options))  # noqa: E731
    monkeypatch.setattr(Generator, "batches", broken)
    (hook,) = build_training(config_of(), "")["hooks"]
    with caplog.at_level("WARNING", "diffusion"):
        values = hook.run(types.SimpleNamespace(averaged_params=lambda: run.params))
    assert "16 of 16 samples are not finite" in caplog.text
    assert tuple(values) == hook.metrics
    assert all(np.isnan(value) != name.startswith("eval/held_out") for name, value in values.items())
    with pytest.raises(Diverged, match=r"energy_distance_ratio is nan \(24 of 24 samples are not finite\)"):
        run.evaluate()


@pytest.mark.parametrize(
    ("sections", "field"),
    [
        ({"checkpoint": {"keep_best": "eval/fid"}}, "checkpoint.keep_best"),
        ({"eval": {"every": 0}}, "checkpoint.keep_best"),
        ({"eval": {"metrics": {}}}, "eval.every"),
        ({"eval": {"every": -1}}, "eval.every"),
        ({"eval": {"every": 3}}, "eval.every"),
        ({"eval": {"batch_size": 0}}, "eval.batch_size"),
        ({"train": {"cond_drop_rate": 0.0}, "eval": {"metrics": {"svc_accuracy": {"guidance": 2.0}}}},
         "guidance.scale"),
        ({"checkpoint": {"keep_best_mode": "mean"}}, "checkpoint.keep_best_mode"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_check_refuses(tmp_path, sections, field):
    with refused(field):
        check(tmp_path, **sections)


def test_what_a_check_accepts(tmp_path):
    check(tmp_path)
    check(tmp_path, checkpoint={"keep_best": "loss"}, eval={"every": 0})


def check(workdir, **sections):
    return check_training(build_training(config_of(**sections), str(workdir)), str(workdir))
