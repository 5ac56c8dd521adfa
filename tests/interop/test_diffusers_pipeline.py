"""Conversion from a run to a pipeline of diffusers and back, by the job `convert`. With diffusers installed (`make
parity`), its pipelines and this library's samplers draw the same images from the same noise."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import fold, normal, sample_keys
from diffusion.interop import diffusers_pipeline, schedulers
from diffusion.pipelines.config import read_config
from diffusion.pipelines.conversion import export_run, import_folder
from diffusion.pipelines.run import open_run
from tests.interop.test_diffusers_models import UNET as TINY
from tests.interop.test_diffusers_models import random_model
from tests.jobs import job
from tests.refusals import refused, refused_field
from tests.tiers import slow_except

SHORT = "--config.train.steps=3 --config.train.batch_size=4 --config.train.preview_every=0 --config.optimizer.warmup=0"
UNET = ("--config=configs/cifar10_ddpm.py --config.network.channel_mult=(1,1) --config.sampler.grid=leading "
        "--config.network.num_res_blocks=1 --config.network.attention_resolutions=(4,)")  # fmt: skip
DIT = ("--config=configs/imagenet256_dit.py:S/2 --config.network.width=16 --config.network.depth=2 "
       "--config.network.num_heads=2 --config.network.freq_shift=1 --config.autoencoder=None")  # fmt: skip


def data_flags(folder, classes=0):
    """Returns flags that replace a config's data by a folder of arrays."""
    section = {"name": "npy", "path": str(folder), "num_classes": classes}
    return [f"--config.data={section}", f"--config.eval.data={section}"]


def trained_and_converted(tmp_path, flags, x, classes=0):
    """Trains for three steps on x and converts the run; returns the folders of both."""
    data = tmp_path / "data"
    data.mkdir()
    np.save(data / "x.npy", x)
    np.save(data / "label.npy", np.arange(len(x)) % max(classes, 1))
    run, folder = tmp_path / "run", tmp_path / "folder"
    paths = [*data_flags(data, classes), f"--workdir={run}"]
    for done in (
        job("train", *flags.split(), *SHORT.split(), *paths),
        job("convert", f"--from={run}", f"--to={folder}"),
    ):
        assert done.returncode == 0, done.stderr
    return run, folder


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    x = np.random.default_rng(0).integers(0, 255, (8, 8, 8, 3), np.uint8)
    return trained_and_converted(tmp_path_factory.mktemp("unet"), UNET, x)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    x = np.random.default_rng(0).normal(size=(8, 8, 8, 4)).astype(np.float16)
    return trained_and_converted(tmp_path_factory.mktemp("dit"), DIT, x, classes=1000)


@pytest.mark.slow
def test_round_trip(unet, tmp_path):
    """A converted pipeline is a run with the same weights, which can be sampled and from which others start."""
    run, folder = unet
    back = tmp_path / "back"
    done = job("convert", f"--from={folder}", f"--to={back}")
    assert done.returncode == 0, done.stderr
    first, second = open_run(str(run)), open_run(str(back))
    assert (second.step, second.spec.shape) == (0, first.spec.shape)
    jax.tree.map(np.testing.assert_array_equal, second.params, first.params)
    for section in ("schedule", "parameterization"):
        assert first.config["objective"][section].items() <= second.config["objective"][section].items()

    data = run.parent / "data"
    frozen = "--config.optimizer.learning_rate=1e-12"
    flags = *UNET.split(), *SHORT.split(), *data_flags(data), frozen, "--config.train.steps=1"
    assert refused_field(job("train", *flags, f"--workdir={back}")) == "workdir"
    workdir = tmp_path / "third"
    done = job("train", *flags, f"--config.init_from={back}", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    third = open_run(str(workdir), "none")
    assert third.step == 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), third.params, first.params)

    assert refused_field(job("convert", f"--from={folder}", f"--to={back}")) == "--to"  # not empty
    assert refused_field(job("convert", f"--from={tmp_path / 'none'}", f"--to={tmp_path / 'to'}")) == "--from"


OBJECTIVE = {"name": "denoising", "schedule": "vp", "parameterization": {"name": "eps", "c_noise": "index"}}


@pytest.mark.parametrize(
    ("objective", "reason"),
    [
        ({"name": "flow_matching", "schedule": "trig"}, "schedule"),
        ({"name": "denoising", "schedule": "edm"}, "schedule"),
        ({"name": "denoising", "parameterization": "eps"}, "c_noise"),
        ({"name": "denoising", "parameterization": {"name": "edm"}}, "parameterization 'edm'"),
    ],
)
def test_an_objective_without_a_scheduler(objective, reason, tmp_path):
    """Only the model is written, and the reason is returned."""
    _, model = random_model(TINY, False)
    assert reason in diffusers_pipeline.write(str(tmp_path), model, {"objective": objective})
    assert diffusers_pipeline.read(str(tmp_path))[1] is None


def test_a_pipeline_in_one_folder(tmp_path):
    """The layout of google/ddpm-cifar10-32 and its like, with and without model_index.json."""
    _, model = random_model(TINY, False)
    diffusers_pipeline.write(str(tmp_path), model, {"objective": OBJECTIVE})
    sections = diffusers_pipeline.read(str(tmp_path))[1]
    for name in ("unet", "scheduler"):
        for file in (tmp_path / name).iterdir():
            file.rename(tmp_path / file.name)
        (tmp_path / name).rmdir()
    for name in ("model_index.json", "scheduler_config.json"):
        read, found, *_ = diffusers_pipeline.read(str(tmp_path))
        jax.tree.map(np.testing.assert_array_equal, read.params, model.params)
        assert found == sections
        (tmp_path / name).unlink()
    assert diffusers_pipeline.read(str(tmp_path))[1] is None


def test_schedulers_that_cannot_be_read(tmp_path):
    _, model = random_model(TINY, False)
    assert diffusers_pipeline.write(str(tmp_path), model, {"objective": OBJECTIVE}) == "DDPMPipeline with DDPMScheduler"
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    for change in ({"beta_schedule": "exp"}, {"prediction_type": "flow"}, {"trained_betas": [0.1]}):
        with refused(f"scheduler_config.json.{next(iter(change))}"):
            schedulers.read(config | change)


def test_a_given_table_of_betas_is_written(tmp_path):
    _, model = random_model(TINY, False)
    schedule = {"name": "vp", "trained_betas": (0.1, 0.2), "num_steps": 2}
    objective = {"name": "denoising", "schedule": schedule, "parameterization": {"name": "eps", "c_noise": "index"}}
    diffusers_pipeline.write(str(tmp_path), model, {"objective": objective})
    config = json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())
    assert config["trained_betas"] == [0.1, 0.2] and config["num_train_timesteps"] == 2


@pytest.mark.parametrize("null_class", slow_except((True,), (True, False)))
def test_a_model_with_a_null_class_can_be_guided(null_class, tmp_path):
    _, model = random_model(TINY | {"null_class": null_class}, True)
    diffusers_pipeline.write(str(tmp_path / "folder"), model, {"objective": OBJECTIVE})
    run = tmp_path / "run"
    import_folder(str(tmp_path / "folder"), str(run), lambda *of: read_config("configs/cifar10_ddpm.py"),
                  null_class=null_class)  # fmt: skip
    opened = open_run(str(run))
    if null_class:
        plain, guided = (opened.sample(2, labels=[0, 1], steps=2, guidance=scale) for scale in (1.0, 2.0))
        assert abs(plain - guided).max() > 1e-3
    else:
        with refused("guidance.scale"):
            opened.sample(2, labels=[0, 1], steps=2, guidance=2.0)


# Comparison with diffusers.

needs_peer = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")


def native_samples(run, labels, num, sampler, scale=1.0):
    opened = open_run(str(run))
    generate = opened.generator(sampler=sampler, guidance={"name": "cfg", "scale": scale})
    cond = {} if labels is None else {"label": labels}
    return generate(opened.params, cond, num, seed=0, batch_size=num), opened


def noises(opened, num, first):
    """Yields this library's initial noise and the noise of each step, NCHW."""
    import torch

    keys = sample_keys(jax.random.key(0), jnp.arange(num))
    shape, sigma = opened.spec.shape, opened.objective.schedule.sigma(jnp.float32(first))
    yield torch.tensor(np.array(sigma * normal(fold(keys, 0), shape)).transpose(0, 3, 1, 2))
    for i in range(1000):
        yield torch.tensor(np.array(normal(fold(keys, i + 1), shape)).transpose(0, 3, 1, 2))


@pytest.mark.peers
@needs_peer
def test_a_ddpm_pipeline_draws_the_same_images(unet, monkeypatch):
    from diffusers import DDPMPipeline

    run, folder = unet
    opened = open_run(str(run))
    x = opened.sample(3, steps=20)  # with the run's own sampler and clipping
    stream = noises(opened, 3, 951 / 1000)
    for module in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{module}.randn_tensor", lambda *args, **kwargs: next(stream))
    images = DDPMPipeline.from_pretrained(folder)(batch_size=3, num_inference_steps=20, output_type="np").images
    np.testing.assert_allclose(images, np.clip(x / 2 + 0.5, 0, 1), atol=1e-4)
    assert images.std() > 0.1


@pytest.mark.peers
@needs_peer
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_dit_pipeline_draws_the_same_images(dit, scale, monkeypatch):
    import torch
    from diffusers import AutoencoderKL, DiTPipeline

    run, folder = dit
    labels = np.array([7, 999, 0])
    x, opened = native_samples(run, labels, 3, {"name": "ddim", "steps": 10, "grid": {"name": "leading"}}, scale)
    stream = noises(opened, 3, 901 / 1000)
    monkeypatch.setattr("diffusers.pipelines.dit.pipeline_dit.randn_tensor", lambda *args, **kwargs: next(stream))
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval()
    pipe = DiTPipeline.from_pretrained(folder, vae=vae)
    images = pipe(list(labels), guidance_scale=scale, num_inference_steps=10, output_type="pt").images
    with torch.no_grad():
        decoded = vae.decode(torch.tensor(np.array(x).transpose(0, 3, 1, 2)) / vae.config.scaling_factor).sample
    np.testing.assert_allclose(images, (decoded / 2 + 0.5).clamp(0, 1), atol=1e-4)
    assert images.std() > 0.05


@pytest.mark.peers
@needs_peer
@pytest.mark.parametrize(
    ("name", "pipeline", "steps"),
    [("DDIMScheduler", "DDIMPipeline", 10), ("DDPMScheduler", "DDPMPipeline", 10),
     ("DPMSolverMultistepScheduler", "DDPMPipeline", 10),
     ("CMStochasticIterativeScheduler", "ConsistencyModelPipeline", 1),
     ("CMStochasticIterativeScheduler", "ConsistencyModelPipeline", 4)],
)  # fmt: skip
def test_pipelines_of_diffusers_draw_the_same_images(name, pipeline, steps, tmp_path, monkeypatch):
    """A pipeline that diffusers saved is read, sampled, written, and sampled by diffusers."""
    import diffusers

    _, model = random_model(TINY, False)
    folder, run, back = (tmp_path / part for part in ("folder", "run", "back"))
    diffusers_pipeline.write(str(folder), model, {"objective": OBJECTIVE})
    unet = diffusers.UNet2DModel.from_pretrained(folder / "unet").eval()
    getattr(diffusers, pipeline)(unet, getattr(diffusers, name)()).save_pretrained(folder / "again")
    import_folder(str(folder / "again"), str(run), lambda *of: read_config("configs/cifar10_ddpm.py"))
    opened = open_run(str(run))
    assert pipeline in export_run(str(run), str(back))
    x = opened.sample(3, steps=steps)

    pipe = getattr(diffusers, pipeline).from_pretrained(back)
    assert type(pipe.scheduler).__name__ == name
    stream = noises(opened, 3, opened.generator(sampler={**opened.config["sampler"], "steps": steps},
                                                guidance=opened.config["guidance"]).times[0])  # fmt: skip
    modules = {type(part).__module__ for part in (pipe, pipe.scheduler)}
    for module in modules:
        monkeypatch.setattr(f"{module}.randn_tensor", lambda *args, **kwargs: next(stream), raising=False)
    if name.startswith("CM"):
        monkeypatch.setattr(pipe.scheduler, "init_noise_sigma", 1.0, raising=False)  # the noise is scaled already
    images = pipe(batch_size=3, num_inference_steps=steps, output_type="np").images
    np.testing.assert_allclose(images, np.clip(x / 2 + 0.5, 0, 1), atol=1e-4)
    assert images.std() > 0.05
