"""Filters that halve and double images."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.layers.resample import double, halve

FILTERS = [(1, 1), (1, 3, 3, 1), (1, 5, 10, 10, 5, 1)]
X = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)


def test_box_filter_averages_and_repeats():
    np.testing.assert_allclose(halve(X, (1, 1))[:, 1, 2], X[:, 2:4, 4:6].mean((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(double(X, (1, 1)), X.repeat(2, 1).repeat(2, 2))


def test_smooth_filter():
    """One pixel in each direction, computed by hand."""
    window = np.outer([1, 3, 3, 1], [1, 3, 3, 1]) / 64
    np.testing.assert_allclose(
        halve(X, (1, 3, 3, 1))[0, 1, 2], np.einsum("hw,hwc->c", window, X[0, 1:5, 3:7]), rtol=1e-4
    )
    near = np.outer([3, 1], [1, 3]) / 16  # three quarters of the nearest pixel in each direction, a quarter of the next
    np.testing.assert_allclose(
        double(X, (1, 3, 3, 1))[0, 5, 6], np.einsum("hw,hwc->c", near, X[0, 2:4, 2:4]), rtol=1e-4
    )


@pytest.mark.parametrize("resample_filter", FILTERS, ids=str)
def test_doubling_is_the_transpose_of_halving(resample_filter):
    y = np.random.default_rng(1).normal(size=(2, 4, 4, 3)).astype(np.float32)
    assert halve(X, resample_filter).shape == y.shape and double(y, resample_filter).shape == X.shape
    np.testing.assert_allclose(
        jnp.vdot(double(y, resample_filter), X), 4 * jnp.vdot(y, halve(X, resample_filter)), rtol=1e-4
    )
    # Away from the edges constants are preserved, and the scale of the weights has no effect.
    np.testing.assert_allclose(double(jnp.ones((1, 8, 8, 1)), resample_filter)[:, 4:-4, 4:-4], 1, rtol=1e-5)
    np.testing.assert_allclose(
        halve(X, tuple(3 * weight for weight in resample_filter)), halve(X, resample_filter), rtol=1e-4, atol=1e-6
    )
