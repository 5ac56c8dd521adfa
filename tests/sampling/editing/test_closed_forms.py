"""Methods of editing on data whose conditional law is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import expand, sample_keys
from diffusion.core.build import build
from diffusion.core.types import Denoised
from diffusion.sampling import loop
from diffusion.sampling.editing import operators
from diffusion.sampling.editing.common import Known, Sampling
from tests.refusals import refused

NUM, MEAN, STD = 10_000, 0.3, 0.7


@pytest.fixture(autouse=True)
def double():
    with jax.enable_x64(True):
        yield


def gaussian(schedule, mean, covariance):
    """Returns the denoiser of N(mean, covariance) on points `[B, D]`."""
    values, vectors = np.linalg.eigh(covariance)

    def denoise(x, t, **more):
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        gain = vectors * (alpha * values / (alpha**2 * values + sigma**2)) @ vectors.T
        return Denoised(mean + (x - alpha * mean) @ gain)

    return denoise


def edited(editing, denoise, schedule, known, shape, steps=60, sampler="heun"):
    """Draws samples of a shape by a method, on evenly spaced times."""
    keys = sample_keys(jax.random.key(0), jnp.arange(NUM))
    falling = np.linspace(1, 0, steps + 1)
    times = jnp.asarray(editing.times(falling))

    def draw(known):
        x = loop.prior(schedule, times[0], keys, shape)
        hooks = editing.hooks(Sampling(lambda x, t, cond: denoise(x, t), schedule, {}, known, times, keys))
        x = loop.sample(
            hooks.denoise, schedule, build("samplers", sampler), x, times, keys, after_step=hooks.after_step,
            renoise=bool((np.diff(times) > 0).any()),
        )  # fmt: skip
        return x if editing.keeps is None else jnp.where(editing.keeps(known), known.image, x)

    return np.asarray(jax.jit(draw)(known))


# The samples are those of white Gaussian images of 4 x 4 pixels, for which the method is exact.
MEASUREMENTS = {
    "inpainting": {},
    "super_resolution": {"factor": 2},
    "colourisation": {},
    "deblurring": {"blur": 0.8, "noise": 0.3},
}


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("operator", MEASUREMENTS)
def test_pseudoinverse_guidance_has_the_posterior_of_gaussians(operator, noise):
    options = {"noise": noise} | MEASUREMENTS[operator]
    noise, channels = options["noise"], 3 if operator == "colourisation" else 1
    shape = (4, 4, channels)
    editing = build("editing", {"name": "pigdm", "operator": operator, "data_std": STD, **options})
    schedule = build("schedules", "vp")
    mask = np.zeros((1, 4, 4, 1))
    mask[:, :2] = 1
    known = Known(np.zeros((1, *editing.measured(shape))), mask)
    apply = operators.make(operator, known, options.get("factor", 4), options.get("blur", 2.0)).apply
    matrix = np.asarray(jax.vmap(lambda x: apply(x.reshape(1, *shape)).ravel())(np.eye(np.prod(shape)))).T
    y = np.random.default_rng(0).normal(size=known.image.shape)
    # The posterior of N(MEAN, STD^2) given y.
    gain = STD**2 * matrix.T @ np.linalg.pinv(STD**2 * matrix @ matrix.T + noise**2 * np.eye(len(matrix)))
    measured = np.asarray(apply(y)) if operator == "inpainting" else y
    mean = MEAN + gain @ (measured.ravel() - MEAN * matrix.sum(1))
    covariance = STD**2 * (np.eye(matrix.shape[1]) - gain @ matrix)

    def denoise(x, t, **more):
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        return Denoised(MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN))

    known = Known(np.broadcast_to(y, (NUM, *y.shape[1:])), mask)
    x = edited(editing, denoise, schedule, known, shape).reshape(NUM, -1)
    np.testing.assert_allclose(x.mean(0), mean, atol=0.01 * STD + 4 * STD / NUM**0.5)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=0.01 * STD**2 + 4 * STD**2 / NUM**0.5)


def test_replacement_is_biased_and_repaint_less():
    """Of two values with a correlation of 0.9, the first is known to be 1: the mean of the other is 0.9."""
    schedule = build("schedules", "vp")
    covariance = np.array([[1, 0.9], [0.9, 1]])
    denoise = gaussian(schedule, np.zeros(2), covariance)
    known = Known(np.broadcast_to([1.0, 0.0], (NUM, 2)), np.broadcast_to([0.0, 1.0], (NUM, 2)))
    found = {}
    for name, options in {"replacement": {}, "once": {"resamples": 1}, "repaint": {"resamples": 10}}.items():
        method = {"name": "replacement" if name == "replacement" else "repaint"} | options
        editing = build("editing", method)
        found[name] = edited(editing, denoise, schedule, known, (2,), 50, {"name": "ddim", "eta": 1.0})
        np.testing.assert_array_equal(found[name][:, 0], 1)  # what is known
    error = {name: (abs(x[:, 1].mean() - 0.9), abs(x[:, 1].var() - 0.19)) for name, x in found.items()}
    assert error["replacement"][0] > 0.05
    for moment in range(2):
        assert error["repaint"][moment] < 0.5 * error["once"][moment], error


def test_the_times_of_repaint():
    editing = build("editing", {"name": "repaint", "length": 2, "resamples": 3})
    times = editing.times(np.array([6, 5, 4, 3, 2, 1, 0]))
    assert times.tolist() == [6, 5, 4, 3, 2, 4, 3, 2, 4, 3, 2, 1, 0, 2, 1, 0, 2, 1, 0]
    assert build("editing", {"name": "repaint", "resamples": 1}).times(np.arange(50)[::-1]).tolist() == [
        *range(49, -1, -1)
    ]


def test_a_soft_mask_is_a_strength_per_pixel():
    """A pixel of strength w is the image with noise until the last w of the steps, and follows the model from there."""
    schedule = build("schedules", "flow")
    editing = build("editing", {"name": "replacement", "soft": True})
    image, strength = np.full((1, 4), 2.0), np.array([[0.0, 0.25, 0.5, 1.0]])
    known, keys, times = Known(image, strength), sample_keys(jax.random.key(0), jnp.arange(1)), jnp.linspace(1, 0, 9)
    after_step = editing.hooks(Sampling(None, schedule, {}, known, times, keys)).after_step
    for s in times[1:]:
        x = after_step(jnp.full((1, 4), 7.0), None, None, s, keys)
        noised = np.asarray(loop.noised(schedule, image, s, keys))
        is_model = np.array([False, s < 0.25, s < 0.5, True])
        np.testing.assert_array_equal(x[0], np.where(is_model, 7.0, noised[0]))
    assert editing.keeps(known).tolist() == [[True, False, False, False]]


def test_what_methods_refuse():
    with refused("editing.noise"):
        build("editing", {"name": "pigdm", "operator": "deblurring"})
    with refused("factor"):
        build("editing", {"name": "pigdm", "operator": "super_resolution", "factor": 3}).measured((8, 8, 3))
    with refused("operator"):
        build("editing", {"name": "pigdm", "operator": "colourisation"}).measured((8, 8, 1))
    with refused("editing.resamples"):
        build("editing", {"name": "repaint", "resamples": 0})
