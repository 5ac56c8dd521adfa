"""Tests the closed forms against autodiff, Tweedie's formula, numerical integrals and a numerical solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from diffusion.core.build import build
from diffusion.process.analytic import Mixture
from tests.process.gaussian_ode import gaussian_ode_map
from tests.refusals import refused

# All parameters differ, so that confusing two of them changes the results.
MIXTURE = Mixture(
    means=np.array([[0.5, -0.2, 0.1], [-0.7, 0.4, 0.3], [0.1, 0.9, -0.6]]),
    stds=np.array([0.3, 0.1, 0.6]),
    weights=np.array([0.5, 0.2, 0.3]),
)
ALPHA = np.array([1.0, 0.8, 0.3, 0.05, 1.0])
SIGMA = np.array([0.01, 0.6, 0.95, 1.0, 20.0])


@pytest.fixture
def x(x64):
    return jax.random.normal(jax.random.key(0), (5, 3), jnp.float64)


def test_density_of_one_component_matches_scipy(x):
    gaussian = Mixture(means=[[0.5, -0.2, 0.1]], stds=[0.3], weights=[1.0])
    expected = norm.logpdf(x, 0.8 * gaussian.means, np.hypot(0.8 * 0.3, 0.6)).sum(axis=1)
    np.testing.assert_allclose(gaussian.log_density(x, 0.8, 0.6), expected, rtol=1e-12)


def test_noised_density_is_the_convolution(x64):
    """In one dimension, p_t(x) is the integral over x0 of p(x0) N(x; alpha x0, sigma^2)."""
    mixture = Mixture(means=[[0.5], [-0.7]], stds=[0.3, 0.1], weights=[3.0, 1.0])  # normalized to 3/4 and 1/4
    x0 = np.linspace(-4, 4, 4001)[:, None]
    clean = np.exp(mixture.log_density(x0))
    np.testing.assert_allclose(np.trapezoid(clean, x0[:, 0]), 1, rtol=1e-10)
    np.testing.assert_allclose(np.trapezoid(clean * x0[:, 0], x0[:, 0]), 0.75 * 0.5 - 0.25 * 0.7, rtol=1e-10)
    for x in (-0.6, 0.0, 1.1):
        kernel = np.exp(-((x - 0.8 * x0[:, 0]) ** 2) / (2 * 0.6**2)) / np.sqrt(2 * np.pi * 0.6**2)
        joint = clean * kernel
        noised = np.exp(mixture.log_density(jnp.array([[x]]), 0.8, 0.6))[0]
        np.testing.assert_allclose(noised, np.trapezoid(joint, x0[:, 0]), rtol=1e-10)
        mean = np.trapezoid(joint * x0[:, 0], x0[:, 0]) / noised
        np.testing.assert_allclose(mixture.denoise(jnp.array([[x]]), 0.8, 0.6)[0, 0], mean, rtol=1e-10)


def test_score_is_the_gradient_of_the_density(x):
    gradient = jax.grad(lambda x: MIXTURE.log_density(x, ALPHA, SIGMA).sum())(x)
    score = MIXTURE.score(x, ALPHA, SIGMA)
    assert score.dtype == jnp.float64
    np.testing.assert_allclose(score, gradient, rtol=1e-10, atol=1e-10)


def test_denoise_is_tweedies_formula(x):
    tweedie = (x + SIGMA[:, None] ** 2 * MIXTURE.score(x, ALPHA, SIGMA)) / ALPHA[:, None]
    np.testing.assert_allclose(MIXTURE.denoise(x, ALPHA, SIGMA), tweedie, rtol=1e-10, atol=1e-10)


def test_scalar_coefficients_are_broadcast(x):
    for method in (MIXTURE.log_density, MIXTURE.score, MIXTURE.denoise):
        np.testing.assert_allclose(method(x, 0.8, 0.6), method(x, np.full(5, 0.8), np.full(5, 0.6)), rtol=1e-12)


def test_ends_are_exact(x):
    """Up to rounding, the denoiser returns x / alpha without noise and the mean of the data without signal."""
    np.testing.assert_allclose(MIXTURE.denoise(x, 1.0, 0.0), x, rtol=1e-15)
    np.testing.assert_allclose(MIXTURE.denoise(x, 0.5, 0.0), 2 * x, rtol=1e-15)
    mean = jnp.broadcast_to(MIXTURE.weights @ MIXTURE.means, x.shape)
    np.testing.assert_allclose(MIXTURE.denoise(x, 0.0, 1.0), mean, rtol=1e-14)
    np.testing.assert_allclose(MIXTURE.denoise(x, 0.0, 80.0), mean, rtol=1e-14)


@pytest.mark.parametrize("shape", [(6,), (3, 2), (1, 3, 2)])
def test_denoiser_follows_the_schedule_on_any_shape(shape):
    mixture = Mixture(means=np.arange(12.0).reshape(2, 6) / 12, stds=[0.2, 0.4], weights=[0.5, 0.5])
    schedule = build("schedules", "vp")
    denoise = mixture.denoiser(schedule)
    x = jax.random.normal(jax.random.key(0), (4, *shape))
    t = jnp.array([0.0, 0.3, 0.7, 1.0])
    answer = jax.jit(denoise)(x, t, {"label": jnp.zeros(4, int)})
    assert answer.x0.shape == x.shape and answer.x0.dtype == jnp.float32 and answer.log_variance is None
    flat = mixture.denoise(x.reshape(4, 6), schedule.alpha(t), schedule.sigma(t))
    np.testing.assert_allclose(answer.x0.reshape(4, 6), flat, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(denoise(x, jnp.float32(0.3)).x0[1], answer.x0[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(answer.x0[0], x[0], rtol=1e-6)


def test_denoiser_keeps_the_dtype_of_x(x64):
    mixture = Mixture(means=np.zeros((1, 2)), stds=[0.5], weights=[1.0])
    for dtype in (jnp.float32, jnp.float64):
        assert mixture.denoiser(build("schedules", "vp"))(jnp.ones((3, 2), dtype), jnp.array(0.5)).x0.dtype == dtype


def test_moments_of_samples(x64):
    n = 40_000
    x = np.asarray(MIXTURE.sample(jax.random.key(1), n))
    assert x.shape == (n, 3) and x.dtype == np.float64
    mean = MIXTURE.weights @ MIXTURE.means
    second = sum(
        w * (np.outer(m, m) + s**2 * np.eye(3))
        for w, m, s in zip(MIXTURE.weights, MIXTURE.means, MIXTURE.stds, strict=True)
    )
    # Four standard errors: the standard deviations of a coordinate and of a product of two are below 0.8.
    assert abs(x.mean(axis=0) - mean).max() < 4 * 0.8 / n**0.5
    assert abs(x.T @ x / n - second).max() < 4 * 0.8 / n**0.5
    noise = np.asarray(Mixture(means=[[0.0]], stds=[1.0], weights=[1.0]).sample(jax.random.key(1), 10))
    assert (noise != noise.astype(np.float32)).all()


def test_entropy(x64):
    gaussian = Mixture(means=[[3.0, 1.0]], stds=[0.3], weights=[1.0])
    entropy, error = gaussian.entropy(jax.random.key(0), 10_000)
    # -log p is a constant plus half a chi-square of 2 degrees of freedom, of variance 1.
    np.testing.assert_allclose(error, 0.01, rtol=0.05)
    assert abs(entropy - np.log(2 * np.pi * np.e * 0.3**2)) < 4 * error
    far = Mixture(means=[[-9.0, 0.0], [9.0, 0.0]], stds=[0.3, 0.3], weights=[0.5, 0.5])
    entropy, error = far.entropy(jax.random.key(0), 10_000)
    assert abs(entropy - np.log(2) - np.log(2 * np.pi * np.e * 0.3**2)) < 4 * error


def test_ode_map_matches_a_numerical_solution(x64):
    """Euler's method on dx/dt = (alpha'/alpha) x - (sigma sigma' - alpha'/alpha sigma^2) score converges to the map.

    Its error is halved with the step size, and Richardson extrapolation of two runs is nearly exact.
    """
    mean, std = jnp.array([0.4, -0.9]), 0.3
    gaussian = Mixture(means=mean[None], stds=[std], weights=[1.0])
    x = jnp.array([[1.0, 0.2], [-0.6, -1.5]])
    alpha, sigma = (lambda t: jnp.cos(t)), (lambda t: jnp.sin(t))
    t, s = 1.2, jnp.array([0.3, 0.6])  # each example ends at a different time

    def euler(steps):
        def step(i, x):
            now = t + (s - t) * i / steps
            d_alpha, d_sigma = -sigma(now) / alpha(now), alpha(now)
            pull = sigma(now) * d_sigma - d_alpha * sigma(now) ** 2
            slope = d_alpha[:, None] * x - pull[:, None] * gaussian.score(x, alpha(now), sigma(now))
            return x + ((s - t) / steps)[:, None] * slope

        return jax.lax.fori_loop(0, steps, step, x)

    exact = gaussian_ode_map(x, mean, std, alpha(t), sigma(t), alpha(s), sigma(s))
    coarse, fine = euler(2000), euler(4000)
    np.testing.assert_allclose(abs(coarse - exact) / abs(fine - exact), 2, rtol=0.01)
    np.testing.assert_allclose(2 * fine - coarse, exact, atol=1e-6)


def test_ode_map_is_invertible_from_end_to_end(x64):
    x = jax.random.normal(jax.random.key(0), (4, 3, 2), jnp.float64)
    mean = jnp.arange(6.0).reshape(3, 2)
    data = gaussian_ode_map(x, mean, 0.4, 0.0, 1.0, 1.0, 0.0)
    np.testing.assert_allclose(data, mean + 0.4 * x, rtol=1e-14)
    np.testing.assert_allclose(gaussian_ode_map(data, mean, 0.4, 1.0, 0.0, 0.0, 1.0), x, rtol=1e-12)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"means": np.zeros(3)}, "means"),
        ({"means": np.zeros((0, 2))}, "means"),
        ({"stds": 0.1}, "stds"),
        ({"stds": [0.1, 0.0]}, "stds"),
        ({"weights": [0.5, 0.3, 0.2]}, "weights"),
        ({"weights": [1.5, -0.5]}, "weights"),
    ],
)
def test_bad_parameters(change, field):
    with refused(field):
        Mixture(**{"means": np.zeros((2, 3)), "stds": [0.1, 0.2], "weights": [0.5, 0.5], **change})


def test_float64_is_exact_while_a_float32_trace_is_alive():
    """JAX caches with a live trace how it converted NumPy arrays; see `Mixture._parameters`."""
    mixture = Mixture(means=[[1 / 3, 2 / 3]], stds=[1 / 3], weights=[1.0])
    x = np.array([[0.1, 0.2]])
    jaxpr = jax.make_jaxpr(mixture.score)(jnp.float32(x), 0.8, 0.6)
    with jax.enable_x64(True):
        expected = -(x - 0.8 * mixture.means) / (0.8**2 * mixture.stds**2 + 0.6**2)
        np.testing.assert_allclose(mixture.score(jnp.asarray(x), 0.8, 0.6), expected, rtol=1e-14)
    assert jaxpr.out_avals[0].dtype == jnp.float32
