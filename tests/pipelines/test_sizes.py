"""Samples of other sizes than the data's, and what divides them."""

import jax
import numpy as np
import pytest

from diffusion.core.types import ArraySpec, ConditionSpec, Spec
from diffusion.distributed.mesh import make_mesh
from diffusion.encoders.autoencoders import pca
from diffusion.pipelines.config import resolve
from diffusion.pipelines.model import build_model
from diffusion.pipelines.run import Run
from tests.refusals import refused
from tests.vae_folders import write_vae

UNET = {"name": "unet", "width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (),
        "head_dim": 8}  # fmt: skip
UVIT = {"name": "uvit", "width": 8, "depth": 3, "num_heads": 2, "conv": False}


def run_of(shape, network=UNET, autoencoder=None, conditions=None):
    """Returns an untrained run; parameters depend on the network alone."""
    config = resolve({"data": "digits", "objective": "denoising", "network": network, "autoencoder": autoencoder,
                      "train": {"steps": 1}, "sampler": {"name": "ddim", "steps": 2}})  # fmt: skip
    spec = Spec(ArraySpec(shape), conditions or {})
    model = build_model(config, spec)
    shapes = jax.eval_shape(lambda: model.objective.init(model.network, jax.random.key(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    return Run(config=config, spec=spec, **model._asdict(), params=params, mesh=mesh)


def test_samples_are_those_of_a_run_of_that_size(tmp_path):
    vae = {"name": "kl", "path": write_vae(tmp_path, (8, 8, 1))}
    conditions = {"image": ConditionSpec("image", (4, 4, 1))}
    run = run_of((8, 8, 1), autoencoder=vae, conditions=conditions)
    cond = {"image": np.random.default_rng(0).normal(size=(1, 6, 4, 1)).astype(np.float32)}
    native = run_of((12, 8, 1), autoencoder=vae, conditions={"image": ConditionSpec("image", (6, 4, 1))})
    x = run.sample(2, cond=cond, size=(12, 8))
    assert x.shape == (2, 12, 8, 1)
    np.testing.assert_array_equal(x, native.sample(2, cond=cond))
    np.testing.assert_array_equal(run.sample(2, cond=cond, size=(12, 8), start=x), native.sample(2, cond=cond, start=x))
    assert run.at_size((12, 8)) is run.at_size((12, 8))  # shares what is compiled
    assert run.spec.shape == (8, 8, 1) and run.autoencoder.shape == (4, 4, 2)


def test_linear_latents_of_another_size(tmp_path):
    images = np.random.default_rng(0).normal(size=(50, 8, 8, 1)).astype(np.float32)
    params, _ = pca.fit(images, 2, 3)
    pca.save(str(tmp_path / "pca.safetensors"), params, (8, 8, 1), 2)
    run = run_of((8, 8, 1), autoencoder={"name": "pca", "path": str(tmp_path / "pca.safetensors")})
    native = run_of((8, 12, 1), autoencoder={"name": "pca", "path": str(tmp_path / "pca.safetensors")})
    np.testing.assert_array_equal(run.sample(1, size=(8, 12)), native.sample(1))


@pytest.mark.parametrize(
    ("size", "problem"),
    [((10, 8), "height must be a multiple of 4 up to 32768, got 10; use 8"), ((8, 2), "width must be a multiple of 4"),
     ((0, 8), "height"), ((8, 40000), "width must be a multiple of 4 up to 32768, got 40000; use 32768")],
)  # fmt: skip
def test_a_side_that_does_not_fit_is_named(size, problem, tmp_path):
    run = run_of((8, 8, 1), autoencoder={"name": "kl", "path": write_vae(tmp_path, (8, 8, 1))})
    with refused("size") as caught:
        run.sample(1, size=size)
    assert caught.value.problem.startswith(problem)


def test_fixed_positions_and_points_take_no_other_size():
    run = run_of((8, 8, 1), UVIT)
    assert run.sample(1, size=(8, 8)).shape == (1, 8, 8, 1)
    with refused("size"):
        run.sample(1, size=(8, 4))
    with refused("size"):
        run_of((2,), {"name": "mlp", "width": 8, "depth": 1}).sample(1, size=(8, 4))


def test_the_moments_of_another_size_are_those_of_the_channels(digits):
    run = run_of((8, 8, 1))
    short = {"name": "denoising", "schedule": {"name": "vp", "num_steps": 50}}
    config = resolve({**run.config, "objective": short})
    model = build_model(config, run.spec)
    run = Run(config=config, spec=digits.spec, **model._asdict(), params=run.params, mesh=run.mesh, source=digits)
    assert run.sample(2, size=(12, 8)).shape == (2, 12, 8, 1)
