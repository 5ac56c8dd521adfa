import contextlib
import dataclasses
import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import optax
import pytest
from PIL import Image

from diffusion.core import locks
from diffusion.core.build import build
from diffusion.core.trees import path_name
from diffusion.distributed import sharding
from diffusion.training import ema, hooks, optimizer
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.options import CheckpointOptions, Options
from diffusion.training.trainer import Trainer, check_same
from tests.refusals import refused

STEPS = 10


@contextlib.contextmanager
def hashed():
    """Yields a list that receives the hash of every batch that is sent to the device."""
    seen = []
    to_global = sharding.to_global

    def record(batch, place):
        seen.append(hashlib.sha256(batch["x"].tobytes() + batch["cond"]["label"].tobytes()).hexdigest())
        return to_global(batch, place)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "to_global", record)
        yield seen


@pytest.fixture(scope="module")
def run(tiny_mlp, digits, mesh_of):
    # A time sampler with a state, so that the train state has everything that it can have.
    objective = build(
        "objectives", {"name": "denoising", "time_sampler": {"name": "importance", "bins": 4, "history": 2}}
    )

    def train(
        workdir, steps=STEPS, *, mesh=(1, 1, 1), every=3, rules=(), hooks=(), network=tiny_mlp, log_every=1, **options
    ):
        return Trainer(
            digits, network, objective, workdir=str(workdir),
            optimizer=optimizer.make_optimizer(steps=STEPS, learning_rate=1e-2, schedule="cosine", warmup=1),
            ema=ema.make_ema(decays=(0.9, 0.99)), mesh=mesh_of(*mesh), rules=rules, fsdp_min_size=0, hooks=hooks,
            options=Options(steps=steps, batch_size=16, log_every=log_every, **options),
            checkpoint=CheckpointOptions(every=every),
            meta={"config": {"network": {"width": 8}, "objective": {}, "data": {"name": "digits"}}},
        ).fit()  # fmt: skip

    return train


def leaves(state):
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return [line["loss"] for line in lines(workdir)]


@dataclasses.dataclass
class Whole:
    """A run without interruption, which all tests compare with."""

    workdir: pathlib.Path
    leaves: dict
    hashes: list


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with hashed() as seen:
        state = run(workdir, hooks=[hooks.preview(4, lambda params: Image.new("L", (4, 4)))])
    return Whole(workdir, leaves(state), seen)


def assert_same(resumed, whole):
    assert whole.keys() == resumed.keys()
    for path in whole:
        np.testing.assert_array_equal(resumed[path], whole[path], err_msg=path)


def test_restart_ends_bit_for_bit_the_same(run, whole, tmp_path):
    """Ten steps equal three steps, a restart and seven: state, averages, moments, metrics and batches."""
    assert len(set(whole.hashes)) == STEPS and (whole.workdir / "previews/step_0000004.png").exists()
    with hashed() as seen:
        run(tmp_path / "cut", steps=3)
        with open(tmp_path / "cut/metrics.jsonl", "a") as file:
            file.write('{"step": 4, "loss": 9.0}\n{"step": 5, "lo')  # what a killed run leaves after its checkpoint
        resumed = leaves(run(tmp_path / "cut"))
    assert seen == whole.hashes and resumed["objective_state/counts"].sum() == STEPS * 16
    assert_same(resumed, whole.leaves)
    assert losses(whole.workdir) == losses(tmp_path / "cut") and len(losses(tmp_path / "cut")) == STEPS


@pytest.mark.slow
def test_a_corrupt_checkpoint_is_quarantined(run, whole, tmp_path, caplog):
    run(tmp_path / "run", steps=6)
    about = tmp_path / "run/checkpoints/6/about/metadata"
    about.write_bytes(about.read_bytes()[:-9])
    with caplog.at_level("INFO", "diffusion"):
        assert_same(leaves(run(tmp_path / "run")), whole.leaves)
    assert "quarantine" in caplog.text and "resuming from step 3" in caplog.text
    assert (tmp_path / "run/quarantine/6/about/metadata").exists()
    assert losses(tmp_path / "run") == losses(whole.workdir)


@pytest.mark.slow
def test_metrics_are_means_over_the_logging_window(run, whole, tmp_path):
    """A restart within a window, here after step 3, changes nothing: its sums are saved with the checkpoint."""
    run(tmp_path, steps=6, log_every=4)
    shutil.rmtree(tmp_path / "checkpoints/6")
    run(tmp_path, log_every=4)
    found, every = lines(tmp_path), lines(whole.workdir)
    assert [line["step"] for line in found] == [4, 8, 10]
    for line, first, last in zip(found, (0, 4, 8), (4, 8, 10), strict=True):
        for name in ("loss", "grad_norm"):
            np.testing.assert_allclose(line[name], np.mean([step[name] for step in every[first:last]]), rtol=1e-6)
        assert line["learning_rate"] == every[last - 1]["learning_rate"]


def test_hooks_and_writers(digits, tiny_mlp):
    """Without a workdir nothing is written; a second call of `fit` continues, as one longer call would."""

    class Writer:
        def __init__(self):
            self.lines = {}

        def write(self, step, values):
            self.lines[step] = values

        def close(self):
            pass

    def trainer(writer, *more):
        parts = digits, tiny_mlp, "flow_matching"
        return Trainer(*parts, optimizer=optax.sgd(1e-2), writers=[writer], hooks=more, batch_size=8, log_every=2)

    seen, first, second = [], Writer(), Writer()
    measure = hooks.evaluate(2, lambda params: {"a": float(short.step), "b": np.nan}, ["a", "b"])
    short = trainer(first, hooks.every(2, lambda t: seen.append((t.step, int(t.state.step), t.metrics))), measure)
    short.fit(3)
    short.fit(6)
    whole = trainer(second).fit(6)
    assert [step for step, _, _ in seen] == [step for _, step, _ in seen] == [2, 3, 4, 6]
    assert np.isfinite([value for _, _, metrics in seen for value in metrics.values()]).all()
    assert len({len(metrics) for _, _, metrics in seen}) > 1  # those of noise levels without an example are absent
    assert_same(leaves(short.state.params), leaves(whole.params))
    for step in (2, 6):
        values = {**first.lines[step], "images_per_second": second.lines[step]["images_per_second"]}
        assert values == {**second.lines[step], "eval/a": step}


def test_a_finished_run_is_not_changed(run, whole):
    with hashed() as seen:
        again = leaves(run(whole.workdir))
    assert not seen
    assert_same(again, whole.leaves)


@pytest.mark.slow
def test_eight_devices_train_as_one(run, tmp_path, digits):
    """Data 2 x fsdp 2 x model 2, with layers split over `model`, against one device: the same losses."""
    spec = {
        "name": "unet",
        "width": 8,
        "channel_mult": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (8,),
        "head_dim": 8,
    }
    unet = build("networks", spec, shape=digits.spec.shape, num_classes=digits.spec.num_classes)
    rules = ((r"conv1/kernel$", (None, None, None, "model")), (r"qkv/kernel$", (None, "model")))
    one = run(tmp_path / "one", every=100, network=unet)
    eight = run(tmp_path / "eight", mesh=(2, 2, 2), rules=rules, every=100, network=unet)
    np.testing.assert_allclose(losses(tmp_path / "eight"), losses(tmp_path / "one"), rtol=1e-5)
    for (path, a), b in zip(jax.tree.leaves_with_path(one.params), jax.tree.leaves(eight.params), strict=True):
        np.testing.assert_allclose(b, a, atol=2e-3, err_msg=path_name(path))
    kernel = eight.params["net"]["down"]["0_0"]["residual"]["conv1"]["kernel"]
    moment = eight.opt_state[1][0].mu["net"]["down"]["0_0"]["residual"]["conv1"]["kernel"]
    assert kernel.sharding.spec == moment.sharding.spec == jax.P(None, None, "fsdp", "model")
    assert "fsdp" in eight.ema["0.9"]["net"]["down"]["0_0"]["residual"]["conv2"]["kernel"].sharding.spec


MOVES = {
    "8 to 1": [(2, 2, 2), (1, 1, 1)],
    "8 to 4 to 1": [(1, 8, 1), (2, 2, 1), (1, 1, 1)],
    "1 to 8": [(1, 1, 1), (2, 2, 2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES)
def test_restores_onto_another_mesh(move, run, whole, tmp_path):
    rules = ((r"blocks/kernel1$", (None, "fsdp", "model")),)
    for number, mesh in enumerate(MOVES[move], start=1):
        steps = STEPS if number == len(MOVES[move]) else 3 * number
        there = run(tmp_path, steps=steps, mesh=mesh, rules=rules)
        kernel = there.params["net"]["blocks"]["kernel1"]
        assert kernel.sharding.num_devices == np.prod(mesh) and kernel.sharding.spec == jax.P(None, "fsdp", "model")
    np.testing.assert_allclose(losses(tmp_path), losses(whole.workdir), rtol=1e-5)
    assert there.step == STEPS


def test_a_batch_that_the_mesh_does_not_divide(run, tmp_path):
    with refused("train.batch_size"):
        run(tmp_path / "new", mesh=(3, 1, 1))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_async_save_of_a_donated_state(run, tmp_path):
    """Every checkpoint of a run is the state of its step, although the next step reuses its memory."""
    run(tmp_path / "all", every=1)
    for step in (STEPS - 2, STEPS - 1):
        ends_there = run(tmp_path / str(step), steps=step)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), ends_there)
        saved, _ = Checkpoints(str(tmp_path / "all"), read_only=True).restore(step, abstract)
        for (path, a), b in zip(jax.tree.leaves_with_path(ends_there), jax.tree.leaves(saved), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=path_name(path))


def test_a_run_resumes_with_options_that_suit_another_machine():
    stored = {"config": {"network": {"name": "dit", "width": 8, "kernel": "cudnn", "dtype": "bfloat16"}}}
    for change in ({"kernel": "auto"}, {"dtype": "float32"}, {"remat": "none"}, {"unroll": 2}):
        check_same(stored, {"config": {"network": {**stored["config"]["network"], **change}}})
    with refused("network.width"):
        check_same(stored, {"config": {"network": {**stored["config"]["network"], "width": 16}}})
    stored = {"config": {"autoencoder": {"name": "kl", "path": "a", "tile": None, "slices": False}}}
    check_same(stored, {"config": {"autoencoder": {"name": "kl", "path": "b", "tile": None, "slices": True}}})
    with refused("autoencoder.tile"):
        check_same(stored, {"config": {"autoencoder": {"name": "kl", "path": "a", "tile": 512, "slices": False}}})


def test_a_run_resumes_with_the_pretrained_networks_that_it_started_with():
    stored = {"config": {"objective": {"perceptual_path": ["a"], "other_path": "a"}}, "pretrained": {"perceptual": "1"}}
    moved = {"config": {"objective": {"perceptual_path": ["b"], "other_path": "a"}}}
    check_same(stored, moved)
    check_same(stored, {**moved, "pretrained": {"perceptual": "1"}})
    with refused("objective.perceptual_path"):
        check_same(stored, {**moved, "pretrained": {"perceptual": "2"}})
    with refused("objective.other_path"):
        check_same(stored, {"config": {"objective": {"perceptual_path": ["a"], "other_path": "b"}}})


def test_a_run_resumes_with_options_that_were_added_since():
    stored = {"config": {"objective": {"name": "denoising", "schedule": {"name": "vp"}}}}
    new = {"name": "denoising", "schedule": {"name": "vp", "shift": 1.0}, "huber": None}
    check_same(stored, {"config": {"objective": new, "adapters": {}, "autoencoder": None}})
    for change in ({"schedule": {"name": "ve"}}, {"schedule": {}}, {"name": "vdm"}):
        with refused(f"objective.{next(iter(change))}"):
            check_same(stored, {"config": {"objective": {**new, **change}}})
    with refused("adapters.lora"):
        check_same(stored, {"config": {"objective": new, "adapters": {"lora": {"rank": 8}}}})


def test_a_second_training_in_the_workdir_is_refused(run, whole, tmp_path):
    """It neither reads nor writes checkpoints. What only reads the run is not concerned."""
    workdir = shutil.copytree(whole.workdir, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    with locks.hold(str(workdir), "workdir"):
        with refused("workdir"):
            run(workdir, STEPS + 2)
        assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before
        assert Checkpoints(str(workdir), read_only=True).latest() == STEPS
    run(workdir, STEPS + 2)
    assert Checkpoints(str(workdir), read_only=True).latest() == STEPS + 2


@pytest.mark.parametrize("name", ["batch_sise", "optimiser"])
def test_an_unknown_option_is_named(name, digits, tiny_mlp):
    near = {"batch_sise": "batch_size", "optimiser": "optimizer"}[name]
    with refused(name) as caught:
        Trainer(digits, tiny_mlp, "denoising", **{name: 3})
    assert f"did you mean '{near}'?" in str(caught.value)
