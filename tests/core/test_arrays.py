"""Scaling of 8-bit data, and metrics of a part of a batch."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import mean_where, scaled
from diffusion.core.images import to_uint8

PIXELS = np.arange(256, dtype=np.uint8)


def test_scaling_is_numpys_in_every_bit():
    expected = PIXELS.astype(np.float32) / 127.5 - 1
    assert expected.dtype == np.float32 and expected[0] == -1 and expected[255] == 1
    for found in (scaled(PIXELS), scaled(jnp.asarray(PIXELS)), jax.jit(scaled)(PIXELS)):
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)
    # Also where the compiler can fuse it with what follows.
    after = jax.jit(lambda x: scaled(x) * 1.7 + 0.3)(PIXELS)
    np.testing.assert_array_equal(after, jax.jit(lambda x: x * 1.7 + 0.3)(expected))
    np.testing.assert_array_equal(to_uint8(scaled(PIXELS)), PIXELS)


def test_other_data_are_unchanged():
    for x in (np.float32([-1.5, 2]), jnp.float32([0.3])):
        assert scaled(x) is x


def test_the_mean_of_a_part_of_a_batch():
    """It is exact over micro-batches, and that of an empty part computes no NaN on the device."""
    x, where = jnp.arange(6.0), jnp.array([True, False, False, False, True, True])
    with jax.debug_nans(True):
        parts = [jax.jit(mean_where)(x[rows], where[rows]) for rows in (slice(0, 3), slice(3, 6))]
        empty = jax.jit(mean_where)(x, x < 0)
    whole = jax.tree.map(lambda *leaves: sum(leaves) / 2, *parts)
    assert float(whole) == 3.0 and np.isnan(float(empty))
