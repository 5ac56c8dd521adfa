"""Trainings on the latents of an autoencoder in a model folder: images are encoded in the step or in advance."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.pipelines import capacity
from diffusion.pipelines.build_training import build_training, check_training
from diffusion.pipelines.config import read_config
from tests.jobs import ROOT, job
from tests.refusals import refused, refused_field
from tests.vae_folders import write_vae

CONFIG = "configs/imagenet256_dit.py:S/2"
SMALL = {"network.width": 8, "network.depth": 1, "network.num_heads": 1, "network.freq_shift": 1, "train.steps": 2,
         "train.batch_size": 8, "train.log_every": 1, "train.preview_every": 2, "sampler.steps": 2}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns a folder of 32 images in two classes, and that of an autoencoder that halves their sides."""
    images, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(32):
        path = images / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (18, 20, 3), np.uint8)).save(path)
    return images, write_vae(tmp_path_factory.mktemp("vae"), (16, 16, 3))


def options(folders, **data):
    """Returns the options of a small training on images of 16x16, with others of the data."""
    images, vae = folders
    data = {"path": str(images), "size": 16, "flip": False, **data}
    return {"autoencoder.path": vae, **SMALL, **{f"data.{key}": value for key, value in data.items()},
            **{f"eval.data.{key}": value for key, value in data.items()}}  # fmt: skip


def flags(config, options):
    return f"--config={config}", *(f"--config.{key}={value}" for key, value in options.items())


@pytest.mark.slow
def test_images_are_encoded_in_the_step_or_in_advance(folders, tmp_path):
    """Both trainings see the same latents."""
    images, cache = flags(f"{CONFIG},images", options(folders)), tmp_path / "cache"
    done = job("train", *images, f"--workdir={tmp_path / 'images'}", "--check")
    assert done.returncode == 0, done.stderr
    assert "the 32 examples, encoded in the step by an autoencoder of 3,905 parameters" in done.stdout
    encoded = {"autoencoder.path": folders[1], "data.path": str(cache), "eval.data.path": str(cache), **SMALL}
    for arguments in (
        ("train", *images, f"--workdir={tmp_path / 'images'}"),
        ("encode", *images, f"--out={cache}"),
        ("train", *flags(CONFIG, encoded), f"--workdir={tmp_path / 'cache_run'}"),
        ("sample", f"--workdir={tmp_path / 'cache_run'}", "--num=2", f"--out={tmp_path}"),
        ("convert", f"--from={tmp_path / 'cache_run'}", f"--to={tmp_path / 'folder'}"),
    ):
        done = job(*arguments)
        assert done.returncode == 0, done.stderr
    losses = [json.loads((tmp_path / run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
              for run in ("images", "cache_run")]  # fmt: skip
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (2, 16, 16, 3)
    written = json.loads((tmp_path / "folder" / "transformer" / "config.json").read_text())
    assert (written["sample_size"], written["in_channels"]) == (8, 2)
    config = read_config(f"{ROOT}/{CONFIG}", encoded.items())
    planned = capacity.train_program(config, capacity.data_source(config), jax.devices()[:1])
    assert planned["spec"].shape == (8, 8, 2) and not planned["program"].frozen
    done = job("train", *flags(CONFIG, encoded), f"--workdir={tmp_path / 'other'}", "--check")
    assert done.returncode == 0 and "in the step" not in done.stdout


@pytest.mark.parametrize(("data", "problem"), [({"size": "(16,17)"}, "16 x 17"), ({"channels": 1}, "of the data is 1")])
def test_images_that_the_autoencoder_cannot_encode_are_refused(data, problem, folders, tmp_path):
    done = job("train", *flags(f"{CONFIG},images", options(folders, **data)), f"--workdir={tmp_path / 'run'}")
    assert refused_field(done) == "autoencoder.path" and problem in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_of_several_sizes_that_the_autoencoder_cannot_encode_is_refused(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = read_config(f"{CONFIG},images", options(folders, size=((16, 16), (17, 20))).items())
    with refused("data.size"):
        check_training(build_training(config, str(tmp_path)), str(tmp_path))
    assert not list(tmp_path.iterdir())
