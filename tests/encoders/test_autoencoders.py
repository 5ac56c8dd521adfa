"""Autoencoders: the linear one against its definition, and models of its latents."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import Autoencoder, InputError, Spec, class_labels
from diffusion.data.pipeline import check_encoder
from diffusion.encoders.autoencoders import pca
from diffusion.pipelines.encoding import encode
from diffusion.pipelines.model import model_of, teacher_of
from diffusion.pipelines.run import open_run
from diffusion.training.hooks import every
from diffusion.training.trainer import Trainer
from tests.jobs import job
from tests.refusals import refused, refused_field

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def fitted(digits, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("pca") / "pca.safetensors")
    params, share = pca.fit(digits.images, 2, 3)
    pca.save(path, params, digits.spec.shape, 2)
    return path, params, share


def encoder(fitted, shape=(8, 8, 1)):
    return build("autoencoders", {"name": "pca", "path": fitted[0]}, shape=shape)


def test_latents_are_white_and_the_loss_is_the_variance_left_out(fitted, digits):
    autoencoder = encoder(fitted)
    assert autoencoder.shape == (4, 4, 3) and len(autoencoder.digest) == 64
    z = np.asarray(autoencoder.encode(autoencoder.params, jnp.asarray(digits.images), None), np.float64)
    assert z.shape == (1500, 4, 4, 3)
    np.testing.assert_allclose(z.reshape(-1, 3).mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(z.reshape(-1, 3), rowvar=False), np.eye(3), atol=1e-4)
    decoded = np.asarray(autoencoder.decode(autoencoder.params, jnp.asarray(z, jnp.float32)))
    patches = digits.images.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 4)
    left_out = np.mean((decoded - digits.images) ** 2) * 4 / patches.var(axis=0, ddof=1).sum()
    np.testing.assert_allclose(left_out, 1 - fitted[2], rtol=1e-3)


def test_all_components_lose_nothing(digits, tmp_path):
    params, share = pca.fit(digits.images, 2, 4)
    pca.save(str(tmp_path / "f.safetensors"), params, (8, 8, 1), 2)
    autoencoder = build("autoencoders", {"name": "pca", "path": str(tmp_path / "f.safetensors")}, shape=(8, 8, 1))
    x = jnp.asarray(digits.images[:20])
    np.testing.assert_allclose(autoencoder.decode(autoencoder.params, autoencoder.encode(autoencoder.params, x, None)),
                               x, atol=1e-5)  # fmt: skip
    assert share == pytest.approx(1)


def test_identity():
    autoencoder = build("autoencoders", "identity", shape=(8, 8, 1))
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    assert autoencoder.shape == (8, 8, 1)
    assert autoencoder.encode({}, x, None) is x and autoencoder.decode({}, x) is x


def test_invalid_files(fitted, tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors")
    for path in (tmp_path / "none.safetensors", tmp_path / "text.safetensors"):
        with refused("autoencoders.path"):
            build("autoencoders", {"name": "pca", "path": str(path)}, shape=(8, 8, 1))
    for shape in ((8, 8, 3), (9, 8, 1), (2,)):
        with refused("autoencoders.path"):
            encoder(fitted, shape)


@pytest.mark.parametrize(
    ("options", "field"),
    [((3, 2), "patch_size"), ((2, 5), "channels"), ((2, 0), "channels"), ((0, 1), "patch_size")],
)
def test_invalid_fits(options, field, digits):
    with refused(field):
        pca.fit(digits.images[:50], *options)


def test_a_step_does_not_copy_the_parameters(tmp_path, digits, tiny_mlp, mesh_of):
    """They are in memory once and in no checkpoint, however large they are."""
    params = {"weights": jnp.ones(2**20)}
    large = Autoencoder(params, lambda params, x: x * params["weights"][:1], lambda params, z: z + 7, (8, 8, 1), "a")
    seen = []

    def large_buffers():
        return {array.unsafe_buffer_pointer() for array in jax.live_arrays() if array.size >= 2**20}

    before = large_buffers()
    hooks = [every(1, lambda trainer: seen.append(large_buffers()))]
    trainer = Trainer(digits, tiny_mlp, "flow_matching", autoencoder=large, workdir=str(tmp_path), steps=4,
                      batch_size=8, mesh=mesh_of(1, 1, 1), hooks=hooks)  # fmt: skip
    trainer.fit()
    assert seen == [before] * 4
    arrays = sum(leaf.nbytes for leaf in jax.tree.leaves((trainer.state.params, trainer.state.ema)))
    saved = sum(path.stat().st_size for path in (tmp_path / "checkpoints").rglob("*") if path.is_file())
    assert saved < 2**20 < params["weights"].nbytes and arrays < 2**20

    # A run whose parts were objects is loaded with them, the autoencoder included.
    parts = {"network": tiny_mlp, "objective": trainer.objective}
    assert open_run(str(tmp_path), **parts, autoencoder=large).sample(num=2, steps=1).mean() > 5
    with refused("autoencoder"):
        open_run(str(tmp_path), **parts)
    with refused("autoencoder.path"):
        open_run(str(tmp_path), **parts, autoencoder=dataclasses.replace(large, digest="b"))


@pytest.fixture(scope="module")
def moved(fitted, tmp_path_factory):
    """A run whose autoencoder was moved: its workdir, and the old and the new path."""
    folder = tmp_path_factory.mktemp("moved")
    workdir, old, new = (str(folder / name) for name in ("run", "old.safetensors", "new.safetensors"))
    shutil.copy(fitted[0], old)
    section, mlp = {"name": "pca", "path": old}, {"name": "mlp", "width": 8, "depth": 1}
    Trainer("digits", mlp, "flow_matching", autoencoder=section, workdir=workdir, batch_size=8).fit(1)
    shutil.move(old, new)
    return workdir, old, new


def test_a_run_is_loaded_with_an_autoencoder_that_was_moved(moved, fitted, digits, tmp_path):
    """Its new path, the whole section or the object replace that of the config; another autoencoder is refused."""
    workdir, old, new = moved
    with refused("autoencoder.path"):
        open_run(workdir)
    for autoencoder in ({"path": new}, {"name": "pca", "path": new}, encoder(fitted)):
        run = open_run(workdir, autoencoder=autoencoder)
        assert run.autoencoder.digest == encoder(fitted).digest and run.network.apply
        assert run.config["autoencoder"]["path"] == (new if isinstance(autoencoder, dict) else old)
    student = {"teacher": open_run(workdir, autoencoder={"path": new}).meta}
    student["teacher"]["config"]["autoencoder"]["path"] = old
    assert teacher_of(student, encoder(fitted)).spec.shape == (4, 4, 3)
    with refused("autoencoder.path"):
        teacher_of(student)
    other = str(tmp_path / "other.safetensors")
    pca.save(other, pca.fit(digits.images[:500], 2, 3)[0], (8, 8, 1), 2)
    for autoencoder in ({"path": other}, dataclasses.replace(encoder(fitted), digest="b")):
        with refused("autoencoder.path"):
            open_run(workdir, autoencoder=autoencoder)


def test_an_autoencoder_that_a_local_function_builds(fitted):
    """The config says no more than that, as of other parts, and a run is loaded with it."""
    trainer = Trainer("digits", {"name": "mlp", "width": 8}, "flow_matching", autoencoder=lambda: encoder(fitted))
    with refused("autoencoder"):
        model_of(trainer.meta)
    assert model_of(trainer.meta, encoder(fitted)).network


@pytest.mark.slow
def test_jobs_take_the_path_of_an_autoencoder_that_was_moved(moved, tmp_path):
    workdir, _, new = moved
    arguments = "sample", f"--workdir={workdir}", "--num=2", "--steps=1", f"--out={tmp_path}"
    assert refused_field(job(*arguments)) == "autoencoder.path"
    done = job(*arguments, f"--autoencoder={new}")
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (2, 8, 8, 1)


def test_encoding_in_advance(fitted, digits, tmp_path):
    """It resumes after an interruption, shares the work, and gives what the step would compute."""
    autoencoder, out = encoder(fitted), str(tmp_path / "latents")

    class Breaks:
        spec = Spec(digits.spec.x, class_labels(10, tuple("abcdefghij")))

        def __len__(self):
            return 250

        def __getitem__(self, index):
            if index >= 130 and self.breaks:
                raise InputError("data", "cannot be read")
            return digits[index]

    source = Breaks()
    source.breaks = True
    options = dict(batch_size=32, shard_size=60)
    with refused("data"):
        encode(source, autoencoder, out, **options)
    shards = sorted(path.name for path in (tmp_path / "latents").glob("*.array_record"))
    assert shards == ["00000.array_record", "00001.array_record"]
    with refused("data.path"):  # not finished
        build("data", {"name": "array_record", "path": out})
    first = (tmp_path / "latents" / shards[0]).stat().st_mtime_ns
    source.breaks = False
    assert encode(source, autoencoder, out, **options)["count"] == 250
    assert (tmp_path / "latents" / shards[0]).stat().st_mtime_ns == first

    cache = build("data", {"name": "array_record", "path": out})
    assert cache.spec.x.kind == "latent" and cache.decoded_spec.x == digits.spec.x and len(cache) == 250
    assert cache.encoder == autoencoder.digest and cache.spec.class_names == tuple("abcdefghij")
    for index in (0, 59, 60, 249):
        z = autoencoder.encode(autoencoder.params, jnp.asarray(digits.images[index : index + 1]), None)[0]
        np.testing.assert_allclose(cache[index]["x"], z, atol=1e-5)
        assert cache[index]["cond"]["label"] == digits.labels[index]

    other = dataclasses.replace(autoencoder, digest="f" * 64)
    for action in (lambda: encode(source, other, out, **options), lambda: encode(digits, autoencoder, out, **options)):
        with refused("--out"):
            action()
    check_encoder(cache, autoencoder)
    with refused("autoencoder.path"):
        check_encoder(cache, other)
    with refused("autoencoder"):
        check_encoder(cache, None)


@pytest.mark.slow
def test_jobs(tmp_path):
    """A fit, an encoding, and a training on the latents, from which images are sampled and measured."""
    config, file, out = f"--config={ROOT}/configs/digits.py", tmp_path / "pca.safetensors", tmp_path / "latents"
    latents = "--config.autoencoder.name=pca", f"--config.autoencoder.path={file}"
    assert refused_field(job("encode", config, *latents, f"--out={out}")) == "autoencoder.path"
    assert refused_field(job("encode", config, f"--out={out}")) == "autoencoder"
    assert refused_field(job("fit_pca", config, f"--out={file}", "--channels=9")) == "--channels"
    for arguments in (("fit_pca", config, f"--out={file}"), ("encode", config, *latents, f"--out={out}")):
        done = job(*arguments)
        assert done.returncode == 0, done.stderr
    assert "1,500 latents (4, 4, 3)" in done.stdout
    assert json.loads((out / "encoding.json").read_text())["data"] == {"name": "digits", "split": "train"}
    workdir = f"--workdir={tmp_path / 'run'}"
    data = f"--config.data={{'name': 'array_record', 'path': {str(out)!r}}}"
    network = "--config.network={'name': 'mlp', 'width': 32, 'depth': 1}"
    short = "--config.train.steps=4", "--config.train.batch_size=16", "--config.train.preview_every=2"
    for encoded in ((), (data,)):
        done = job("train", config, *latents, *encoded, network, *short, f"{workdir}{len(encoded)}")
        assert done.returncode == 0, done.stderr
    lines = [(tmp_path / f"run{number}" / "metrics.jsonl").read_text().splitlines()[-1] for number in (0, 1)]
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    done = job("sample", f"{workdir}1", "--num=4", "--steps=2", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (4, 8, 8, 1)
