import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.guidance import cfg


@pytest.fixture(scope="module")
def case(ddpm, tiny_unet, tiny_params, digits_batch):
    denoise = ddpm.denoiser(tiny_unet.apply, tiny_params)
    x, cond = digits_batch["x"], digits_batch["cond"]
    keep = jnp.ones(16, bool)
    one = jax.jit(denoise)
    conditional = one(x, 0.5, {**cond, "keep": keep}).x0
    unconditional = one(x, 0.5, {**cond, "keep": ~keep}).x0
    guided = jax.jit(lambda x, scale: cfg(denoise, scale)(x, 0.5, cond).x0)
    return x, conditional, unconditional, guided


@pytest.mark.parametrize("scale", [0.0, 1.0, 1.5, 7.5])
def test_one_batch_of_two_halves_equals_two_passes(case, scale):
    x, conditional, unconditional, guided = case
    expected = unconditional + scale * (conditional - unconditional)
    np.testing.assert_allclose(guided(x, scale), expected, rtol=1e-5, atol=1e-5 * (1 + scale))


def test_the_condition_matters(case):
    _, conditional, unconditional, _ = case
    assert abs(conditional - unconditional).max() > 1e-2


def test_scale_is_an_array_argument(case):
    x, _, _, guided = case
    guided(x, 2.0)
    before = guided._cache_size()
    guided(x, 3.0)
    assert guided._cache_size() == before
