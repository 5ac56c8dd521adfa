import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion.core.build import build
from diffusion.evaluation.log_likelihood import dequantize, ode_log_likelihood, variational_bound
from diffusion.process.analytic import Mixture
from diffusion.process.decoders import discretized_log_likelihood, level_log_likelihood
from tests.tiers import slow_except

GAUSSIAN = Mixture(means=np.zeros((1, 3)), stds=np.array([0.5]), weights=np.ones(1))
MIXTURE = Mixture(means=np.array([[0.6, 0.2], [-0.6, 0.0]]), stds=np.array([0.2, 0.3]), weights=np.array([0.3, 0.7]))
SCHEDULES = ["vp_sde", "flow", "trig", {"name": "edm", "sigma_max": 400.0}, "vp"]


@pytest.mark.parametrize("schedule", slow_except(("flow",), SCHEDULES), ids=str)
def test_ode_finds_the_exact_density(x64, schedule):
    """For a mixture, on every schedule. The error arises because the marginal at the end is not exactly normal."""
    schedule = build("schedules", schedule)
    x = MIXTURE.sample(jax.random.key(0), 20)
    low = max(float(schedule.log_snr(jnp.float64(1))), -12.0)
    found = ode_log_likelihood(
        MIXTURE.denoiser(schedule), schedule, x, jax.random.key(1), steps=400, log_snr=(16.0, low), data_std=0.55
    )
    np.testing.assert_allclose(found, MIXTURE.log_density(x), atol=5e-3)


@pytest.mark.slow
def test_ode_solver_is_of_fourth_order(x64):
    """For a Gaussian, whose marginal at the end is exactly normal, halving the step divides the error by 16."""
    schedule = build("schedules", "flow")
    x = GAUSSIAN.sample(jax.random.key(0), 5)
    exact = GAUSSIAN.log_density(x, 1.0, np.exp(-8.0))  # with the noise that x has where the ODE starts
    denoise, kwargs = GAUSSIAN.denoiser(schedule), dict(log_snr=(16.0, -10.0), data_std=0.5)
    found = [ode_log_likelihood(denoise, schedule, x, jax.random.key(1), steps=n, **kwargs) for n in (20, 40, 80)]
    errors = [abs(log_p - exact).max() for log_p in found]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    np.testing.assert_allclose(slopes, 4, atol=0.4)
    assert errors[-1] < 2e-4


def test_hutchinson_is_unbiased(x64):
    """The mean over probes is the exact trace, for a Jacobian that is not diagonal."""
    schedule = build("schedules", "flow")
    x = jnp.broadcast_to(MIXTURE.sample(jax.random.key(2), 1), (400, 2))
    kwargs = dict(steps=60, log_snr=(12.0, -10.0), data_std=0.55)
    exact = ode_log_likelihood(MIXTURE.denoiser(schedule), schedule, x[:1], jax.random.key(1), **kwargs)
    found = ode_log_likelihood(MIXTURE.denoiser(schedule), schedule, x, jax.random.key(1), trace="hutchinson", **kwargs)
    assert found.std() > 1e-3
    assert abs(found.mean() - exact[0]) < 4 * found.std() / 20


@pytest.mark.slow
@pytest.mark.parametrize("schedule", slow_except(("flow",), ("vp_sde", "flow", "ve")))
def test_bound_converges_to_the_entropy(x64, schedule):
    """The gap between the optimal model's bound and the entropy halves as the number of steps doubles."""
    schedule = build("schedules", schedule)
    x = GAUSSIAN.sample(jax.random.key(0), 3000)
    low = max(float(schedule.log_snr(jnp.float64(1))), -14.0)
    gaps = []
    for steps in (64, 128, 256):
        times = schedule.time(jnp.linspace(14.0, low, steps + 1))
        bound = variational_bound(GAUSSIAN.denoiser(schedule), schedule, x, jax.random.key(1), times)
        # Compared with the density of the same points, so that most of the sampling noise cancels.
        gaps.append(float((bound["total"] + GAUSSIAN.log_density(x)).mean()))
    assert gaps[-1] > 0
    ratios = np.array(gaps[:-1]) / gaps[1:]
    np.testing.assert_allclose(ratios, 2, atol=0.25)


@pytest.mark.slow
def test_bound_of_discrete_data(x64):
    """The entropy of fair coins is log 2 nats each."""
    schedule = build("schedules", "flow")
    x = jax.random.rademacher(jax.random.key(0), (20_000, 2), jnp.float64)
    coins = Mixture(
        means=np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]), stds=np.full(4, 1e-6), weights=np.full(4, 0.25)
    )
    times = schedule.time(jnp.linspace(6.0, -12.0, 513))
    bound = variational_bound(coins.denoiser(schedule), schedule, x, jax.random.key(1), times, levels=2)
    assert 0 < bound["total"].mean() / 2 - np.log(2) < 0.02


def test_level_log_likelihood(x64):
    seen, std = jnp.array([[0.1, -0.9]]), jnp.float64(0.3)
    values = np.linspace(-1, 1, 5)
    logits = -((np.asarray(seen)[..., None] - values) ** 2) / (2 * 0.3**2)
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for index, value in enumerate(values):
        found = level_log_likelihood(jnp.full((1, 2), value), seen, std, 5)
        np.testing.assert_allclose(found, expected[..., index], rtol=1e-9)


def test_discretized_log_likelihood(x64):
    """The mass of each bin is accurate also far out in the tails, and all bins sum to 1."""
    levels = np.linspace(-1, 1, 9)
    for mean, std in ((0.2, 0.15), (-0.97, 0.05), (3.0, 0.1)):
        found = discretized_log_likelihood(jnp.asarray(levels), jnp.float64(mean), jnp.float64(std), 9)
        edges = np.concatenate([[-np.inf], levels[:-1] + 0.125, [np.inf]])
        below = stats.norm(mean, std).logcdf
        above = stats.norm(mean, std).logsf
        lower, upper = edges[:-1], edges[1:]
        with np.errstate(divide="ignore"):
            left = below(upper) + np.log1p(-np.exp(below(lower) - below(upper)))
            right = above(lower) + np.log1p(-np.exp(above(upper) - above(lower)))
        expected = np.where(lower + upper > 2 * mean, right, left)
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
        np.testing.assert_allclose(np.exp(found).sum(), 1, rtol=1e-9)


def test_dequantize():
    """The noise is uniform within a bin, and the offset turns the log-density into the log-probability of a level."""
    x = jnp.asarray(np.linspace(-1, 1, 17))[jax.random.randint(jax.random.key(0), (50_000,), 0, 17)]
    spread, offset = dequantize(x, jax.random.key(1), 17)
    assert abs(spread - x).max() <= 1 / 16 and abs((spread - x).std() - 2 / 16 / 12**0.5) < 1e-3
    density = -np.log(17 * 2 / 16)  # uniform over all bins
    np.testing.assert_allclose(density + offset, -np.log(17), rtol=1e-6)


@pytest.mark.parametrize("spec", ["edm", {"name": "vp", "num_steps": 100}], ids=str)
def test_ode_ends_where_the_schedule_does(x64, spec):
    """Beyond t = 1 the network is not trained."""
    schedule = build("schedules", spec)
    exact = GAUSSIAN.denoiser(schedule)

    def denoise(x, t):
        inside = t <= 1 + 1e-9
        return jax.tree.map(lambda leaf: jnp.where(inside, leaf, jnp.nan), exact(x, t))

    x = GAUSSIAN.sample(jax.random.key(0), 4)
    found = ode_log_likelihood(denoise, schedule, x, jax.random.key(1), steps=100, log_snr=(12.0, -14.0), data_std=0.5)
    np.testing.assert_allclose(found, GAUSSIAN.log_density(x), atol=1e-3)
