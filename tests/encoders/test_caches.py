"""Data sets that were encoded in advance: the posteriors of all images, from which training draws its latents."""

import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import ArraySpec, InputError, Spec, class_labels
from diffusion.data import records
from diffusion.data.pipeline import check_encoder
from diffusion.pipelines import capacity
from diffusion.pipelines.build_training import build_training
from diffusion.pipelines.conditions import moments_of
from diffusion.pipelines.config import read_config, resolve
from diffusion.pipelines.encoding import encode
from diffusion.pipelines.evaluation import Decoded, build_metrics
from diffusion.pipelines.model import Model
from diffusion.profiling import cost_model
from diffusion.training.trainer import Trainer
from tests.distributed.test_processes import together
from tests.jobs import ROOT, job
from tests.refusals import refused, refused_field
from tests.vae_folders import write_vae


class Examples:
    """Images of digits, with the classes and captions that digits lack."""

    def __init__(self, images, changed=()):
        self.images, self.changed = images, dict(changed)
        self.spec = Spec(ArraySpec(images.shape[1:]), class_labels(3, ("a", "b", "ç")), captions=True)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        if index in self.changed:
            return self.changed[index]
        return {"x": self.images[index], "cond": {"label": np.int32(index % 3)}, "caption": f"naïve {index}"}


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


def read(folder, **keywords):
    return build("data", {"name": "array_record", "path": str(folder), **keywords})


@pytest.fixture(scope="module")
def kl_folder(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("kl"), (8, 8, 1))


@pytest.fixture(scope="module")
def kl(kl_folder):
    return build("autoencoders", {"name": "kl", "path": kl_folder}, shape=(8, 8, 1))


@pytest.fixture(scope="module")
def examples(digits):
    return Examples(digits.images[:70])


@pytest.fixture(scope="module")
def cached(kl, examples, tmp_path_factory):
    """The folder of a cache with mirror images, and what `encode` returned."""
    folder = tmp_path_factory.mktemp("cache") / "latents"
    return folder, encode(examples, kl, str(folder), flip=True, batch_size=32, shard_size=48)


def test_a_cache_holds_the_posteriors_the_labels_and_the_captions(kl, examples, cached):
    """They are the same bits as those of a batch of the same size, and the latents at the mode are those of images."""
    found = read(cached[0], captions=True)
    assert len(found) == 140 and found.decoded_spec == examples.spec and found.spec.shape == (4, 4, 4)
    x = np.concatenate([examples.images, examples.images[:, :, ::-1], examples.images[:20]])  # five batches
    posterior, modes = (
        np.concatenate([jax.jit(function)(kl.params, x[i : i + 32]) for i in range(0, 160, 32)])[:140]
        for function in (kl.posterior, lambda params, x: kl.encode(params, x, None))
    )
    np.testing.assert_array_equal([found[index]["x"] for index in range(140)], posterior)
    np.testing.assert_array_equal(jax.jit(kl.sample, static_argnums=1)(posterior, None), modes)
    for index in range(140):
        assert found[index]["cond"]["label"] == index % 70 % 3 and found[index]["caption"] == f"naïve {index % 70}"


def test_the_moments_of_the_latents_are_recorded(kl, cached):
    """They are those of samples of the posteriors, and not of their means alone."""
    folder, info = cached
    stored = json.loads((folder / "info.json").read_text())
    mean, log_variance = np.split(np.stack([read(folder)[index]["x"] for index in range(140)]), 2, axis=-1)
    across = mean.var(axis=(0, 1, 2)) + np.exp(log_variance).mean(axis=(0, 1, 2))
    assert across.min() > 1.1 * mean.var(axis=(0, 1, 2)).max()  # so that the test tells them apart
    expected = {"mean": 2 * mean.mean(axis=(0, 1, 2)), "std": 2 * np.sqrt(across)}  # the scale is 2
    for name, values in expected.items():
        np.testing.assert_allclose(stored["latents"][name], values, atol=0.1)
        np.testing.assert_array_equal(stored["latents"][name], info["latents"][name])
    assert stored["count"] == info["count"] == 140


def test_an_interrupted_encoding_gives_the_same_files(kl, examples, cached, tmp_path):
    class Breaks(Examples):
        def __getitem__(self, index):
            if index >= self.limit:
                raise InputError("data", "cannot be read")
            return super().__getitem__(index)

    out = tmp_path / "latents"
    out.mkdir()
    (out / "encoding.json.partial").write_text("{")  # killed while the first file was written
    source, options = Breaks(examples.images), dict(flip=True, batch_size=32, shard_size=48)
    source.limit = 60
    with refused("data"):
        encode(source, kl, str(out), **options)
    assert sorted(contents(out)) == ["00000.array_record", "encoding.json"]
    source.limit = 70
    encode(source, kl, str(out), **options)
    assert contents(out) == contents(cached[0])


def test_an_encoding_is_not_continued_with_something_else(kl, examples, tmp_path):
    """The refusal says what differs. The place of the data may change, and nothing is written."""
    data = {"name": "folder", "path": "a", "split": "train", "seed": 0}
    folder, options = tmp_path / "latents", dict(data=data, batch_size=32, shard_size=48)
    encode(examples, kl, str(folder), **options)
    before = contents(folder)
    encode(examples, kl, str(folder), **{**options, "data": {**data, "path": "b", "new": 1}})
    other = dataclasses.replace(kl, digest="f" * 64)
    for source, autoencoder, change, words in (
        (examples, kl, {"data": {**data, "split": "test"}}, "data.split is 'test', was 'train'"),
        (examples, kl, {"data": {"name": "digits"}}, "data.name is 'digits', was 'folder'"),
        (examples, other, {}, "another autoencoder (SHA-256"),
        (examples, kl, {"batch_size": 16}, "--batch_size=32, got --batch_size=16"),
        (examples, kl, {"flip": True}, "--flip=false, got --flip=true"),
        (Examples(examples.images[:50]), kl, {}, "70 images, got 50"),
        (examples, kl, {"shard_size": 60}, "other data"),
    ):
        with refused("--out") as caught:
            encode(source, autoencoder, str(folder), **options | change)
        assert words in caught.value.problem
    assert contents(folder) == before
    for text in ("[]", "{}", "{"):
        (folder / "encoding.json").write_text(text)
        with refused("--out") as caught:
            encode(examples, kl, str(folder), **options)
        assert "other files" in caught.value.problem


def test_latents_that_do_not_fit_on_the_disk_are_refused(kl, tmp_path):
    """They are refused before anything is written, and the option that limits endless data is named."""
    data = {"name": "shapes", "size": 8, "length": 2**31 - 1}

    class Endless(Examples):
        def __len__(self):
            return data["length"]

    with refused("--out") as caught:
        encode(Endless(np.zeros((1, 8, 8, 1), np.float32)), kl, str(tmp_path / "latents"), data=data)
    assert "data.length" in caught.value.problem and not (tmp_path / "latents").exists()


def test_training_on_a_cache_is_training_on_images(kl_folder, kl, digits, tmp_path, mesh_of):
    """The losses and the parameters are the same bits, and so are what previews, metrics and samples use."""
    mesh, states = mesh_of(1, 1, 1), []
    encode(digits, kl, str(tmp_path / "latents"), batch_size=16)
    cache = read(tmp_path / "latents")
    for data in (digits, cache):
        trainer = Trainer(data, {"name": "mlp", "width": 8, "depth": 1}, "flow_matching", autoencoder=kl, mesh=mesh,
                          batch_size=16)  # fmt: skip
        states.append((trainer.fit(steps=3).params, trainer.metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, *states)

    config = resolve({
        "data": {"name": "digits"}, "objective": {"name": "flow_matching"}, "train": {"batch_size": 16},
        "network": {"name": "mlp", "width": 8, "depth": 1}, "autoencoder": {"name": "kl", "path": kl_folder},
    })  # fmt: skip
    parts = capacity.train_program(config, cache, jax.devices()[:1])
    assert parts["batch"]["x"].shape == (16, 4, 4, 4) and parts["spec"].shape == (4, 4, 2)
    assert not parts["program"].frozen and cost_model.products(parts["program"], parts["batch"])

    decoded = Decoded.of(cache, kl)
    z = kl.encode(kl.params, jnp.asarray(digits.images[:1]), None)
    np.testing.assert_allclose(decoded[0]["x"], kl.decode(kl.params, z)[0], atol=1e-4)
    schedule = build("schedules", {"name": "vp", "betas": "linear", "num_steps": 20})
    of_images, of_cache = (moments_of(schedule, lambda data=data: data, kl) for data in (digits, cache))
    for expected, found in zip(of_images, of_cache, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_bad_input(kl, examples, cached, digits, tmp_path):
    bad = dataclasses.replace(kl, posterior=lambda params, x: kl.posterior(params, x / (x[:, :1, :1] != 7)))
    for flip, name, shard in ((False, "example 40 ", 1), (True, "example 40, mirrored, ", 3)):
        x, out = np.zeros((8, 8, 1), np.float32), tmp_path / f"bad{flip}"
        x[0, -1 if flip else 0] = 7
        with refused("autoencoder") as caught:
            encode(Examples(examples.images, {40: {**examples[40], "x": x}}), bad, str(out), flip=flip, batch_size=16,
                   shard_size=32)  # fmt: skip
        assert name in caught.value.problem and bad.digest[:12] in caught.value.problem
        assert sorted(contents(out)) == [*(f"0000{n}.array_record" for n in range(shard)), "encoding.json"]
    folder, _ = cached
    with refused("data"):  # encoded twice
        encode(read(folder), kl, str(tmp_path / "again"))
    with refused("data"):
        records.check_fits(read(folder))
    with refused("--flip"):
        encode(build("data", "toy"), build("autoencoders", "identity", shape=(2,)), str(tmp_path / "toy"), flip=True)
    with refused("data.flip"):
        read(folder, flip=True)
    other = dataclasses.replace(kl, digest="f" * 64)
    for autoencoder, field in ((other, "autoencoder.path"), (None, "autoencoder")):
        with refused(field):
            Trainer(read(folder), "mlp", "flow_matching", autoencoder=autoencoder)
        with refused(field):
            section = {"data": {"name": "array_record", "path": str(folder)}, "metrics": {}}
            build_metrics({"eval": section}, digits, Model(None, None, autoencoder))
    with refused("autoencoder.path") as caught:
        check_encoder(read(folder), other)
    assert str(folder) in caught.value.problem
    config = {**read_config(f"{ROOT}/configs/digits.py"), "data": {"name": "array_record", "path": str(folder)}}
    config["network"] = {"name": "unet", "attention_resolutions": (3,)}  # which images of this size do not have
    with refused("autoencoder"):
        build_training(resolve(config), str(tmp_path / "run"))
    shutil.copytree(folder, tmp_path / "old")
    info = json.loads((folder / "info.json").read_text())
    del info["latents"]
    (tmp_path / "old" / "info.json").write_text(json.dumps(info))
    with refused("data.path"):
        read(tmp_path / "old")


FLAGS = ("--config=configs/shapes.py", "--config.data.length=4500", "--config.autoencoder.name=kl", "--flip")


@pytest.mark.slow
def test_processes_and_kills_do_not_change_the_files(tmp_path):
    """One process, two processes, and a process that is killed at random moments write the same bytes."""
    write_vae(tmp_path / "kl", (32, 32, 3))
    command = ["experiments.encode", *FLAGS, f"--config.autoencoder.path={tmp_path}/kl"]
    began = time.monotonic()
    (printed,) = together(1, *command, f"--out={tmp_path}/one")
    assert "9,000 latents (16, 16, 2)" in printed and "mean" in printed
    expected, duration = contents(tmp_path / "one"), time.monotonic() - began
    assert sorted(expected) == [*(f"0000{n}.array_record" for n in range(3)), "encoding.json", "info.json"]
    together(2, *command, f"--out={tmp_path}/two")
    assert contents(tmp_path / "two") == expected

    out, draw, environment = tmp_path / "killed", random.Random(0), {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-m", *command, f"--out={out}"]
    for _ in range(4):
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not (out / "encoding.json").exists():
                time.sleep(0.01)
            time.sleep(draw.uniform(0, duration / 4))
            process.kill()
        assert process.returncode in (0, -signal.SIGKILL)
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert contents(out) == expected


@pytest.mark.slow
def test_images_that_do_not_fit_are_refused(tmp_path):
    """The factor of the autoencoder does not divide their side, or they have other channels; nothing is written."""
    write_vae(tmp_path / "kl", (32, 32, 3))
    for shape in ((2, 9, 8, 3), (2, 8, 8, 1)):
        np.save(tmp_path / "x.npy", np.zeros(shape, np.uint8))
        data = f"--config.data={{'name': 'npy', 'path': {str(tmp_path)!r}}}"
        flags = FLAGS[0], data, FLAGS[2], f"--config.autoencoder.path={tmp_path}/kl", f"--out={tmp_path}/out"
        assert refused_field(job("encode", *flags)) == "autoencoder.path" and not (tmp_path / "out").exists()
