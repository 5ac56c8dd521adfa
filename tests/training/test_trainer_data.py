"""The trainer on a folder of images: skipped images, several sizes, a moved folder, worker processes."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.core.build import build
from diffusion.data.pipeline import Batches
from diffusion.training import hooks, optimizer
from diffusion.training.checkpoint import Checkpoints
from diffusion.training.options import CheckpointOptions, Options
from diffusion.training.trainer import Trainer
from tests.data.test_pipeline import Numbers, take
from tests.refusals import refused
from tests.tiers import slow_except

BATCH_SIZE = 4
MLP = {"name": "mlp", "width": 8, "depth": 1}


@pytest.fixture
def folder(tmp_path):
    """Ten images, two of which are corrupt; five are twice as wide."""
    rng, root = np.random.default_rng(0), tmp_path / "images"
    root.mkdir()
    for number in range(10):
        pixels = rng.integers(0, 256, (8, 8 + 8 * (number % 2), 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{number}.png")
    for number in (3, 6):
        (root / f"{number}.png").write_bytes(b"")
    return root


@pytest.fixture
def run(mesh_of):
    def train(workdir, steps, path, *, network=MLP, size=8, on_error="skip", captions=False, mesh=(1, 1, 1), workers=0):
        data = {"name": "folder", "path": str(path), "size": size, "labels": False, "on_error": on_error}
        source = build("data", {**data, "captions": captions}, field="data")
        return Trainer(
            source, network, "denoising", workdir=str(workdir), optimizer=optimizer.make_optimizer(steps=10),
            mesh=mesh_of(*mesh), options=Options(steps=steps, batch_size=BATCH_SIZE, log_every=1, workers=workers),
            checkpoint=CheckpointOptions(every=100),
            meta={"config": {"network": network, "objective": {}, "data": data}},
        ).fit()  # fmt: skip

    return train


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_skipped_examples_are_counted(run, tmp_path, folder):
    """Two of the ten in every epoch, over the whole run, whatever the restarts, devices and workers."""
    run(tmp_path / "whole", 10, folder)
    run(tmp_path / "cut", 4, folder)
    run(tmp_path / "cut", 10, folder, mesh=(2, 1, 1), workers=1)
    whole, cut = ([line["skipped"] for line in metrics(tmp_path / name)] for name in ("whole", "cut"))
    assert whole == cut == sorted(whole) and whole[4] == 4 and whole[9] == 8  # two epochs, four epochs


@pytest.mark.slow
def test_a_folder_may_move_and_errors_may_be_handled_differently(run, tmp_path, folder):
    run(tmp_path / "run", 1, folder)
    with refused("data"):
        run(tmp_path / "run", 10, folder, on_error="raise")
    run(tmp_path / "run", 10, folder.rename(tmp_path / "moved"))
    assert metrics(tmp_path / "run")[-1]["skipped"] == 8


@pytest.mark.parametrize("workers", slow_except((0,), (0, 2)))
def test_a_bad_image_costs_no_step(run, tmp_path, folder, workers):
    """The run is saved before it ends, and resumes bit for bit once the image is mended."""
    for number in (3, 6):
        (folder / f"{number}.png").write_bytes((folder / "0.png").read_bytes())
    whole = run(tmp_path / "whole", 4, folder, on_error="raise")
    first, second, third = take(Batches(Numbers(10), batch_size=BATCH_SIZE, seed=0), 3)
    bad = folder / f"{next(number for number in third if number not in first + second)}.png"
    pixels = bad.read_bytes()
    bad.write_bytes(pixels[:60])
    with refused("data") as caught:
        run(tmp_path / "cut", 4, folder, on_error="raise", workers=workers)
    for word in (str(bad), "on_error", "step 2 is saved"):
        assert word in caught.value.problem
    assert Checkpoints(str(tmp_path / "cut"), read_only=True).steps() == [2]
    bad.write_bytes(pixels)
    resumed = run(tmp_path / "cut", 4, folder, on_error="raise", workers=workers)
    jax.tree.map(np.testing.assert_array_equal, whole.params, resumed.params)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("whole", "cut")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("metrics", [(), ("eval/x",)])
def test_a_hook_that_fails_costs_no_step(digits, tmp_path, mesh_of, metrics):
    def fail(trainer):
        raise KeyError("lost")

    trainer = Trainer(digits, MLP, "denoising", workdir=str(tmp_path), steps=4, batch_size=4, mesh=mesh_of(1, 1, 1),
                      hooks=[hooks.Hook(3, fail, metrics=metrics)])  # fmt: skip
    with pytest.raises(KeyError):
        trainer.fit()
    assert Checkpoints(str(tmp_path), read_only=True).steps() == [3]


def test_nothing_is_saved_if_no_step_was_made(tmp_path, mesh_of):
    trainer = Trainer(Numbers(10, fails=3), MLP, "denoising", workdir=str(tmp_path), steps=4, batch_size=10,
                      mesh=mesh_of(1, 1, 1))  # fmt: skip
    with refused("data") as caught:
        trainer.fit()
    assert caught.value.problem == "number 3" and Checkpoints(str(tmp_path), read_only=True).steps() == []


def test_other_data_are_refused(run, tmp_path, folder):
    run(tmp_path / "run", 1, folder)
    with refused("data.size"):
        run(tmp_path / "run", 10, folder, size=4)
    Image.new("RGB", (8, 8)).save(folder / "new.png")
    with refused("data"):
        run(tmp_path / "run", 10, folder)


@pytest.mark.slow
def test_batches_of_several_sizes(run, tmp_path, folder):
    unet = {
        "name": "unet",
        "width": 8,
        "channel_mult": (1,),
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "head_dim": 8,
    }
    run(tmp_path / "run", 5, folder, network=unet, size=((8, 8), (8, 16)))
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))
    run(tmp_path / "run", 10, folder, network=unet, size=((8, 8), (8, 16)))
    assert len(metrics(tmp_path / "run")) == 10


@pytest.mark.parametrize("size", [((8, 8), (8, 10)), ((8, 10), (8, 8))])
def test_sizes_that_the_network_cannot_take_are_refused(run, tmp_path, folder, size):
    """Before the first step, whichever batch would meet one."""
    unet = {"name": "unet", "width": 8, "channel_mult": (1, 1, 1), "num_res_blocks": 1, "attention_resolutions": (),
            "head_dim": 8}  # fmt: skip
    with refused("") as caught:
        run(tmp_path / "run", 5, folder, network=unet, size=size)
    assert "10" in caught.value.problem and not (tmp_path / "run").exists()


def test_captions_without_a_reader_are_refused(run, tmp_path, folder):
    with refused("data.captions"):
        run(tmp_path / "run", 1, folder, captions=True)
    assert not (tmp_path / "run").exists()
