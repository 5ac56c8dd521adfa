"""The perceptual distance of reconstructions; tests/pipelines/test_autoencoder_training.py has the other values."""

import types

import jax
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Spec
from diffusion.encoders.vision import lpips
from diffusion.layers.autoencoder import AutoencoderApply
from tests.encoders import vgg
from tests.refusals import refused

SHAPE = (16, 16, 1)
X = np.random.default_rng(0).uniform(-1, 1, (3, *SHAPE)).astype(np.float32)


class Data:
    spec = Spec(ArraySpec(SHAPE))

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return {"x": X[index], "cond": {}}


def halving(shape):
    """Returns the functions of an autoencoder whose reconstruction of x is x / 2."""
    module = types.SimpleNamespace(encode=lambda x: x, features=lambda z: z, output=lambda z: z / 2)
    return AutoencoderApply("halving", lambda params: module, shape, shape, ())


def test_lpips_is_averaged_over_images(tmp_path):
    paths = vgg.write(tmp_path)
    section = {"name": "reconstruction", "batch_size": 2, "lpips": paths}
    metric = build("evaluation", section, train=Data(), held_out=Data())
    values = metric(halving(SHAPE), {})
    expected = float(jax.jit(lpips.distance)(lpips.read(paths, ""), X, X / 2).mean())
    assert metric.names == tuple(values) == ("psnr", "lpips") and values["lpips"] == pytest.approx(expected, rel=1e-5)
    metric.check(halving(SHAPE))
    with refused("eval.metrics.reconstruction.lpips"):
        metric.check(halving((8, 16, 1)))
    with refused("evaluation.lpips"):
        build("evaluation", {**section, "lpips": ("absent",)}, train=Data(), held_out=Data())
