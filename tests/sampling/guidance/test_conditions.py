"""Guidance with several conditions, texts, and conditions that are dropped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import sample_keys
from diffusion.core.build import build, build_network
from diffusion.core.types import ArraySpec, ConditionSpec, Denoised, Spec, Text
from diffusion.pipelines.generator import Generator, structure
from diffusion.sampling import guidance as guidances
from diffusion.sampling.guidance import cfg, cfg_per_condition
from diffusion.sampling.loop import bind, prior, sample
from tests.refusals import refused
from tests.sampling.guidance.closed_form import BOTH, TIMES, X, model_of_two

# One scale per condition.


@pytest.mark.parametrize("t", TIMES, ids=["one time", "a time per example"])
@pytest.mark.parametrize("scales", [{"image": 1.5, "text": 7.5}, {"text": 7.5, "image": 1.5}, {"image": 1, "text": 1}])
def test_one_scale_per_condition(scales, t):
    first, second = scales
    x0 = [
        model_of_two(X, t, {**BOTH, "keep": {first: np.full(4, one), second: np.full(4, both)}}).x0
        for one, both in ((False, False), (True, False), (True, True))
    ]
    found = cfg_per_condition(model_of_two, scales)(X, t, BOTH)
    expected = x0[0] + scales[first] * (x0[1] - x0[0]) + scales[second] * (x0[2] - x0[1])
    np.testing.assert_array_equal(found.x0, expected)
    np.testing.assert_array_equal(found.conditional, x0[2])
    np.testing.assert_array_equal(found.log_variance, x0[2] / 2)


@pytest.mark.parametrize("scales", [{"image": 2.0}, {"image": 2.0, "text": 2.0, "label": 1.0}])
def test_every_condition_must_have_a_scale(scales):
    with refused("guidance.scales"):
        cfg_per_condition(model_of_two, scales)(X, 0.5, BOTH)


def test_the_scales_and_their_order_in_a_sampler(ddpm, mesh_of):
    """Other scales share the compiled function; another order does not."""
    conditions = {"a": ConditionSpec("vector", (2,)), "b": ConditionSpec("vector", (3,))}
    spec = Spec(ArraySpec((2,), "points"), conditions)
    network = build_network({"name": "mlp", "width": 8, "depth": 1}, spec)
    params = {"net": jax.tree.map(lambda leaf: leaf + 0.3, jax.jit(network.init)(jax.random.key(0)))}
    settings = {"sampler": {"name": "ddim", "steps": 2}}

    def sections(**scales):
        return {**settings, "guidance": {"name": "cfg_per_condition", "scales": scales}}

    cond = jax.tree.map(lambda value: value + 1, spec.zeros(2))
    first = Generator(network, ddpm, spec, mesh_of(1, 1, 1), cond_drop_rate=0.1, **sections(b=3.0, a=1.0))
    found = [first.with_settings(**sections(**scales))(params, cond, 2, seed=0)
             for scales in ({"b": 3.0, "a": 1.0}, {"b": 1.0, "a": 3.0})]  # fmt: skip
    assert first.compilations == 1 and abs(found[0] - found[1]).max() > 1e-4
    for scales, x in zip(({"b": 3.0, "a": 1.0}, {"b": 1.0, "a": 3.0}), found, strict=True):
        schedule, keys = ddpm.schedule, sample_keys(jax.random.key(0), jnp.arange(2))
        denoise = bind(cfg_per_condition(ddpm.denoiser(network.apply, params), scales), cond)
        start = prior(schedule, first.times[0], keys, (2,))
        expected = sample(denoise, schedule, build("samplers", "ddim"), start, first.times, keys)
        np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-4)
    orders = [structure(sections(**scales)["guidance"]) for scales in ({"a": 1.0, "b": 2.0}, {"b": 2.0, "a": 1.0})]
    assert orders[0] != orders[1] == structure(sections(b=5.0, a=1.0)["guidance"])


def test_a_negative_text():
    negative = Text(np.float32([[0.5], [0.2]]), np.ones(2, bool))
    found = cfg(model_of_two, 3.0, negative={"text": negative})(X, 0.35, BOTH).x0
    rows = jax.tree.map(lambda value: np.stack([value] * 4), negative)
    with_text, without = (model_of_two(X, 0.35, {**BOTH, "text": text}).x0 for text in (BOTH["text"], rows))
    np.testing.assert_array_equal(found, without + 3.0 * (with_text - without))


def test_texts_that_differ_in_one_token_are_different_structures():
    """Such texts have the same `repr` as NumPy arrays, which leaves out the middle."""
    texts = [Text(np.eye(64, dtype=np.float32) * scale, np.ones(64, bool)) for scale in (1, 1)]
    texts[1].tokens[30, 30] = 2
    keys = [repr(structure({"name": "cfg", "scale": 2.0, "negative": {"text": text}})) for text in texts]
    assert keys[0] != keys[1]


@pytest.mark.parametrize("name", ["cfg", "apg", "cfg_per_condition"])
@pytest.mark.parametrize("mapping", [False, True])
def test_conditions_that_the_caller_drops_stay_dropped(name, mapping):
    def denoise(x, t, cond):
        keep = cond["keep"]["label"] if isinstance(cond["keep"], dict) else cond["keep"]
        return Denoised(0.3 * x + jnp.where(keep, cond["label"] + 1.0, 0)[:, None])

    options = {"scales": {"label": 3.0}} if name == "cfg_per_condition" else {"scale": 3.0}
    guided = getattr(guidances, name)(denoise, **options)
    keep, x = jnp.array([True, False]), jnp.ones((2, 2))
    cond = {"label": jnp.array([4.0, 4.0]), "keep": {"label": keep} if mapping else keep}
    x0 = guided(x, jnp.float32(0.5), cond).x0
    np.testing.assert_allclose(x0[1], 0.3, rtol=1e-6)
    assert (x0[0] > 1).all()
