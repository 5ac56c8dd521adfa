"""Editing by a run: what is kept and what is not, in images and in latents, without recompilation."""

import jax
import numpy as np
import pytest

from diffusion.core.types import ArraySpec, Autoencoder, Spec
from diffusion.distributed.mesh import make_mesh
from diffusion.pipelines.config import resolve
from diffusion.pipelines.model import build_model
from diffusion.pipelines.run import Run
from tests.refusals import refused

CONFIG = resolve({
    "data": "digits",
    "objective": "flow_matching",
    "network": {"name": "mlp", "width": 16, "depth": 1},
    "train": {"steps": 1, "batch_size": 1},
    "sampler": {"name": "euler", "steps": 6},
})  # fmt: skip
IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 8, 8, 1)).astype(np.float32)
MASK = np.zeros((8, 8), np.float32)
MASK[:, 4:] = 1


def untrained(autoencoder=None):
    """Returns a run with random parameters, for images of 8 x 8 pixels."""
    spec = Spec(ArraySpec((8, 8, 1)))
    model = build_model(CONFIG, spec, autoencoder=autoencoder)
    params = jax.tree.map(lambda leaf: leaf + 0.1, model.objective.init(model.network, jax.random.key(0)))
    mesh = make_mesh(data=1, devices=jax.devices()[:1])
    return Run(config=CONFIG, spec=spec, **model._asdict(), params=params, mesh=mesh)


@pytest.fixture(scope="module")
def run():
    return untrained()


@pytest.mark.parametrize("method", ["replacement", {"name": "repaint", "length": 2, "resamples": 2}])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_what_the_mask_keeps_is_exact(run, method, strength):
    x = run.edit(IMAGES, MASK, method=method, strength=strength)
    np.testing.assert_array_equal(x[:, :, :4], IMAGES[:, :, :4])
    assert np.abs(x[:, :, 4:] - IMAGES[:, :, 4:]).min(axis=(1, 2, 3)).max() > 0


def test_a_soft_mask_may_be_weak(run):
    soft = {"name": "replacement", "soft": True}
    x = run.edit(IMAGES, 0.3 * MASK, method=soft)
    np.testing.assert_array_equal(x[:, :, :4], IMAGES[:, :, :4])
    assert np.abs(x[:, :, 4:] - IMAGES[:, :, 4:]).max() > 0
    with refused("mask"):
        run.edit(IMAGES, 0.3 * MASK)


def test_the_ends_of_the_strength(run):
    """0 returns the images; 1 is sampling from noise on a schedule that ends in noise."""
    np.testing.assert_array_equal(run.edit(IMAGES, strength=0), IMAGES)
    np.testing.assert_array_equal(run.edit(IMAGES, MASK, strength=0), IMAGES)
    np.testing.assert_array_equal(run.edit(IMAGES, strength=1), run.sample(3))
    few, many = (np.abs(run.edit(IMAGES, strength=strength) - IMAGES).mean() for strength in (0.2, 0.9))
    assert 0 < few < many


def test_nothing_is_recompiled():
    run = untrained()
    for image, mask, strength in ((IMAGES, MASK, 0.9), (-IMAGES, 1 - MASK, 0.4), (IMAGES[::-1], MASK.T, 0.6)):
        run.edit(image, mask, strength=strength)
    (generator,) = run._generators.values()
    assert generator.compilations == 1


def test_a_measurement_has_another_shape(run):
    """That the samples follow it is tested where the model is known; this one is not trained."""
    small = IMAGES.reshape(3, 4, 2, 4, 2, 1).mean((2, 4))
    method = {"name": "pigdm", "operator": "super_resolution", "factor": 2}
    x = run.edit(small, method=method, num=6)
    assert x.shape == (6, 8, 8, 1) and np.abs(x - run.edit(-small, method=method, num=6)).min() > 0


def test_latents_are_kept_and_so_are_the_pixels():
    """The autoencoder halves the sides, and is far from exact."""
    halved = lambda x: x.reshape(len(x), 4, 2, 4, 2, 1).mean((2, 4))  # noqa: E731
    autoencoder = Autoencoder({}, lambda params, x: halved(x), lambda params, z: z.repeat(2, 1).repeat(2, 2) + 0.5,
                              (4, 4, 1), "0" * 64, lambda encoded, key: encoded)  # fmt: skip
    x = untrained(autoencoder).edit(IMAGES, MASK)
    np.testing.assert_array_equal(x[:, :, :4], IMAGES[:, :, :4])
    with refused("method"):
        untrained(autoencoder).edit(IMAGES, MASK, method="pigdm")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ({"image": IMAGES[..., :0]}, "image"), ({"image": IMAGES.astype(int)}, "image"), ({"mask": MASK[:4]}, "mask"),
        ({"mask": 0 * MASK}, "mask"), ({"mask": np.ones_like(MASK)}, "mask"), ({"mask": 255 * MASK}, "mask"),
        ({"strength": 1.5}, "strength"), ({"strength": -0.1}, "strength"), ({"strength": 0.01}, "strength"),
        ({"method": "repaint"}, "mask"), ({"method": "no_such"}, "method"),
        ({"method": {"name": "pigdm", "operator": "super_resolution", "factor": 2}, "mask": MASK}, "image"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(run, arguments, field):
    with refused("") as caught:
        run.edit(**{"image": IMAGES, **arguments})
    assert caught.value.field.startswith(field)
