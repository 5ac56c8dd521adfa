"""Runs that start from another: what they take over, and what their checkpoints leave out."""

import json
import shutil

import jax
import numpy as np
import pytest

from diffusion.core import trees
from diffusion.pipelines import warm_start
from diffusion.pipelines.build_training import build_training
from diffusion.pipelines.config import override, resolve
from diffusion.pipelines.run import open_run
from diffusion.training.trainer import Trainer
from tests.refusals import refused

CONFIG = {
    "data": "digits",
    "objective": {"name": "flow_matching"},
    "network": {"name": "mlp", "width": 8, "depth": 1},
    "train": {"steps": 2, "batch_size": 8, "log_every": 1},
    "checkpoint": {"keep": 10},
    "ema": {"decays": (0.5, 0.9)},
}
LORA = [("adapters.lora.rank", 2), ("optimizer.learning_rate", 0.1)]


def train(workdir, *overrides):
    return Trainer(**build_training(resolve(override(CONFIG, overrides)), str(workdir)), workdir=str(workdir)).fit()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "source"
    train(workdir)
    return workdir


def start_of(source, *overrides):
    keywords = build_training(resolve(override(CONFIG, [("init_from", str(source)), *overrides])), "none")
    return trees.by_path(keywords["start"]), keywords["meta"]


def test_parse():
    assert warm_start.parse("runs/a") == ("runs/a", None, "")
    assert warm_start.parse("gs://b/run:0.9:net/(a|b):c") == ("gs://b/run", "0.9", "net/(a|b):c")
    assert warm_start.parse("runs/a::embed") == ("runs/a", None, "embed")


@pytest.mark.parametrize("ema", [None, "0.5", "none"])
def test_every_array_is_taken_over(source, tmp_path, ema):
    """Also by the averages."""
    where = str(source) if ema is None else f"{source}:{ema}"
    theirs = trees.by_path(open_run(str(source), ema).params)
    found, meta = start_of(where)
    assert meta["origin"]["step"] == 2 and found.keys() == theirs.keys()
    keywords = build_training(resolve(override(CONFIG, [("init_from", where)])), "none")
    trainer = Trainer(**keywords)
    trainer._make_program(2)
    state = trainer.program.init(None, trainer.start)
    for tree in (state.params, state.ema["0.5"], state.ema["0.9"]):
        jax.tree.map(np.testing.assert_array_equal, trees.by_path(tree), theirs)


def test_another_number_of_classes(source, tmp_path, caplog):
    """Only the table of classes is new, and the log says so."""
    caplog.set_level("INFO")
    found, _ = start_of(source, ("data", {"name": "toy", "kind": "mixture"}))
    assert "net/embed/label/embedding" not in found and "net/linear_in/kernel" not in found
    assert "net/embed/label/embedding ([9, 8], not [11, 8])" in caplog.text
    assert "net/embed/inner/kernel" in found


def test_the_matrices_of_an_adapter_are_new(source, caplog):
    caplog.set_level("INFO")
    start_of(source, *LORA)
    assert "; new: net/lora/" in caplog.text and "not taken over" not in caplog.text


def test_an_expression_selects_arrays_and_an_objective_that_differs_is_reported(source, caplog):
    found, _ = start_of(f"{source}::embed", ("objective", {"name": "denoising"}))
    assert found and all("embed" in path for path in found)
    assert "objective.parameterization" in caplog.text


def test_a_partial_run_saves_and_resumes_what_it_trains(source, tmp_path):
    """A run of low-rank matrices: its checkpoints hold them alone, and it is loaded with its base."""
    overrides = [("init_from", str(source)), *LORA]
    state = train(tmp_path / "lora", *overrides, ("train.steps", 4))
    assert state.params["net"].keys() == {"lora"}
    run, base = open_run(str(tmp_path / "lora")), open_run(str(source))
    jax.tree.map(np.testing.assert_array_equal, run.params["net"]["base"], base.params["net"])
    assert not np.allclose(run.sample(num=4, steps=2), base.sample(num=4, steps=2))
    assert run.sample(num=4, steps=2).shape == (4, 8, 8, 1)

    halves = tmp_path / "halves"
    train(halves, *overrides, ("train.steps", 2))
    again = train(halves, *overrides, ("train.steps", 4))
    jax.tree.map(np.testing.assert_array_equal, again, state)
    # A run may start from a partial one.
    found, _ = start_of(tmp_path / "lora", *LORA)
    assert any("/base/" in path for path in found) and any("/lora/" in path for path in found)


@pytest.mark.slow
def test_a_changed_origin_is_refused(source, tmp_path):
    copy, lora = tmp_path / "source", tmp_path / "lora"
    shutil.copytree(source, copy)
    train(lora, ("init_from", str(copy)), *LORA)
    shutil.rmtree(copy)
    with refused("init_from.workdir"):
        open_run(str(lora))
    train(copy, ("seed", 1))
    with refused("init_from"):
        open_run(str(lora))
    with refused("init_from"):
        train(lora, ("init_from", str(copy)), *LORA, ("train.steps", 4))


def test_layers_that_are_not_trained(source, tmp_path):
    patterns = ("train.trainable", ("linear_out",))
    state = train(tmp_path / "head", ("init_from", str(source)), patterns)
    assert trees.by_path(state.params).keys() == {"net/linear_out/kernel", "net/linear_out/bias"}
    run, base = (trees.by_path(open_run(str(path)).params) for path in (tmp_path / "head", source))
    for path in base:
        assert np.array_equal(run[path], base[path]) == ("linear_out" not in path), path
    with refused("train.trainable"):
        train(tmp_path / "none", patterns)
    with refused("train.trainable"):
        train(tmp_path / "none", ("init_from", str(source)), ("train.trainable", ("nothing",)))


@pytest.mark.slow
def test_players_without_an_average(tmp_path):
    """They are read as they were trained."""
    state = train(tmp_path, ("objective", {"name": "gan"}), ("sampler", {"name": "consistency", "steps": 1}))
    run = open_run(str(tmp_path))
    jax.tree.map(np.testing.assert_array_equal, run.params["critic"], state.params["critic"])
    jax.tree.map(np.testing.assert_array_equal, run.params["net"], state.ema["0.9"]["net"])
    assert run.sample(num=2).shape == (2, 8, 8, 1)


def test_invalid_origins(source, tmp_path):
    for where, field in ((tmp_path / "none", "init_from.workdir"), (f"{source}:0.7", "init_from.ema"),
                         (f"{source}::nothing", "init_from"), (f"{source}::(", "init_from")):  # fmt: skip
        with refused(field):
            start_of(where)
    with refused("config.init_from"):
        resolve({**CONFIG, "init_from": 3})


def test_latents(source, tmp_path, digits):
    """A model of latents: the autoencoder's parameters are in no checkpoint, and its file must stay the same."""
    from diffusion.encoders.autoencoders import pca

    file = str(tmp_path / "pca.safetensors")
    params, _ = pca.fit(digits.images, 2, 3)
    pca.save(file, params, (8, 8, 1), 2)
    overrides = ("autoencoder.name", "pca"), ("autoencoder.path", file)
    state = train(tmp_path / "run", *overrides)
    assert state.params["net"]["linear_in"]["kernel"].shape == (4 * 4 * 3, 8)
    run = open_run(str(tmp_path / "run"))
    assert run.sample(num=3, steps=2).shape == (3, 8, 8, 1) and run.autoencoder.shape == (4, 4, 3)
    about = json.loads(json.dumps(run.meta))
    assert about["autoencoder"] == {"sha256": run.autoencoder.digest}
    jax.tree.map(np.testing.assert_array_equal, train(tmp_path / "run", *overrides, ("train.steps", 2)), state)
    metrics = ("eval", {"metrics": {"held_out_loss": {}}, "every": 1})
    with refused("eval.metrics.held_out_loss"):
        train(tmp_path / "other", *overrides, metrics)
    pca.save(file, {**params, "mean": params["mean"] + 1}, (8, 8, 1), 2)
    for action in (lambda: open_run(str(tmp_path / "run")), lambda: train(tmp_path / "run", *overrides)):
        with refused("autoencoder.path"):
            action()
