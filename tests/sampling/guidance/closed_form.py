"""Denoisers in closed form, and what the tests of guidance share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand, kept
from diffusion.core.build import build
from diffusion.core.types import Denoised, Text
from diffusion.sampling.guidance import apg, autoguidance, cfg, cfg_pp, cfg_zero
from diffusion.sampling.loop import bind, sample

FLOW, VP = build("schedules", "flow"), build("schedules", "vp")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3, 2)).astype(np.float32)
COND = {"label": np.float32([0.0, 0.7, 1.4, 2.6])}
NULL = -2.0  # the label of the model where keep is False
TIMES = [0.35, np.float32([0.2, 0.45, 0.7, 0.95])]


def x0_of(x, t, level):
    """Returns the x0 of the model; it is nonlinear in every argument, so that a wrong argument changes the result."""
    return jnp.cos(x + expand(jnp.asarray(level + 3.0 * t), x))


def model(x, t, cond):
    x0 = x0_of(x, t, jnp.where(kept(cond, "label"), cond["label"], NULL))
    return Denoised(x0, log_variance=x0 / 2)


def worse(x, t, cond):
    """The worse model of `autoguidance`: `model` without its condition."""
    return model(x, t, {**cond, "keep": jnp.zeros(x.shape[0], bool)})


METHODS = {
    "cfg": cfg,
    "apg": apg,
    "cfg_zero": functools.partial(cfg_zero, schedule=FLOW),
    "cfg_pp": cfg_pp,
    "autoguidance": functools.partial(autoguidance, worse=worse),
}
WITH_NEGATIVE = ["cfg", "apg", "cfg_zero", "cfg_pp"]


def halves(t, level=NULL):
    """Returns x0 with and without the condition, as float64."""
    return np.float64(x0_of(X, t, COND["label"])), np.float64(x0_of(X, t, level))


def arguments_of(method, cond=COND, t=0.35):
    """Returns the arguments x, t and cond of the single model call of a guided evaluation."""
    calls = []

    def denoise(x, t, cond):
        calls.append((x, t, cond))
        return model(x, t, cond)

    method(denoise)(X, t, cond)
    (call,) = calls
    return call


def close(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def dot(a, b):
    return np.sum(a * b, axis=(1, 2), keepdims=True)


def broadcast(t):
    return np.broadcast_to(t, 4).reshape(4, 1, 1)


def sampled(denoise, sampler, times=(0.9, 0.6, 0.3, 0.0)):
    sampler, key = build("samplers", sampler), jax.random.key(0)
    return jax.jit(lambda times: sample(bind(denoise, COND), FLOW, sampler, X, times, key))(jnp.asarray(times))


def distilled(x, t, cond):
    """A model that is conditioned on the guidance scale."""
    return Denoised(X * expand(cond["guidance_scale"] * cond["label"] * t, X))


BOTH = {
    "image": np.float32([[0.1], [0.4], [0.9], [1.6]]),
    "text": Text(np.float32(RNG.normal(size=(4, 2, 1))), np.ones((4, 2), bool)),
}


def model_of_two(x, t, cond):
    """x0 depends on both conditions and on their combination."""
    image = jnp.where(kept(cond, "image"), cond["image"][:, 0], NULL)
    text = jnp.where(kept(cond, "text"), cond["text"].tokens.sum(axis=(1, 2)), 0.3)
    x0 = x0_of(x, t, image + image * text)
    return Denoised(x0, log_variance=x0 / 2)
