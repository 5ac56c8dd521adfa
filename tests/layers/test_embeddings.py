"""Features of scalars: their frequencies, and that random ones never change."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.layers.embeddings import fourier, fourier_with_phases, sinusoidal

LABELS = jnp.array([0.0, 1.0, 300.0])


@pytest.mark.parametrize("freq_shift", [0, 1])
@pytest.mark.parametrize("sin_first", [False, True])
def test_sinusoidal_frequencies(freq_shift, sin_first):
    angles = np.outer(LABELS, 10_000.0 ** -(np.arange(4) / (4 - freq_shift)))
    waves = [np.cos(angles), np.sin(angles)]
    expected = np.concatenate(waves[::-1] if sin_first else waves, axis=1)
    np.testing.assert_allclose(sinusoidal(LABELS, 8, freq_shift=freq_shift, sin_first=sin_first), expected, atol=1e-4)


def test_random_features_never_change():
    """Trained weights depend on them, and checkpoints do not contain them."""
    expected = [1.35266, 0.14141, -0.16659, -1.30126]
    np.testing.assert_allclose(fourier_with_phases(jnp.array([0.3]), 4)[0], expected, atol=1e-5)
    angles = 2 * np.pi * 0.3 * 2 * np.array([1.764052, 0.400157])  # RandomState(0).randn(2)
    expected = np.concatenate([np.cos(angles), np.sin(angles)])
    np.testing.assert_allclose(fourier(jnp.array([0.3]), 4, scale=2.0)[0], expected, atol=1e-5)


def test_random_features_have_unit_magnitude():
    features = fourier_with_phases(jnp.linspace(-2, 2, 9), 4000)
    assert features.shape == (9, 4000)
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(features**2, axis=1)), 1, atol=0.04)
