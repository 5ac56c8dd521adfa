import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from diffusion.core.build import build, names
from tests.refusals import refused

N = 20_000


def draw(spec, schedule="vp", n=N, state=None):
    sampler = build("time_sampling", spec)
    state = sampler.initial_state() if state is None else state
    t, weight = sampler.draw(build("schedules", schedule), jax.random.key(0), n, state)
    return np.asarray(t), np.asarray(weight)


@pytest.mark.parametrize("name", names("time_sampling"))
def test_times_are_in_range(name):
    t, weight = draw(name)
    assert t.shape == weight.shape == (N,) and t.min() > 0 and t.max() <= 1
    np.testing.assert_allclose(weight, 1, rtol=1e-5)  # also for importance sampling, before the first loss


def ks(t, cdf):
    """Returns sqrt(N) times the Kolmogorov-Smirnov statistic, which exceeds 1.95 with probability 1/1000."""
    return stats.kstest(t, cdf).statistic * N**0.5


@pytest.mark.parametrize("name", ["uniform", "importance"])
def test_uniform(name):
    assert ks(draw(name)[0], "uniform") < 1.95


def test_stratified_times_are_evenly_spaced():
    t, _ = draw("stratified", n=64)
    np.testing.assert_allclose(np.diff(np.sort(t)), 1 / 64, atol=1e-6)


def test_discrete_times_are_the_points_of_the_table():
    t, _ = draw("discrete", {"name": "vp", "num_steps": 10})
    values, counts = np.unique(t, return_counts=True)
    np.testing.assert_allclose(values, np.arange(1, 11) / 10, rtol=1e-6)
    assert stats.chisquare(counts).pvalue > 1e-3
    assert len(np.unique(draw({"name": "discrete", "num_steps": 4}, "flow")[0])) == 4
    with refused("time_sampler.num_steps"):
        draw("discrete", "flow")


def test_logit_normal():
    t, _ = draw({"name": "logit_normal", "mean": 0.5, "std": 2.0}, "flow")
    assert ks(t, lambda t: stats.norm.cdf((np.log(t / (1 - t)) - 0.5) / 2)) < 1.95


@pytest.mark.parametrize("schedule", ["edm", "flow", "trig", "vp_sde"])
def test_log_normal_in_sigma(schedule):
    t, _ = draw({"name": "log_normal", "mean": -0.5, "std": 0.7}, schedule)
    log_sigma = -np.asarray(build("schedules", schedule).log_snr(jnp.asarray(t))) / 2
    assert ks(log_sigma, stats.norm(-0.5, 0.7).cdf) < 1.95


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.81, 1.29])
def test_mode(scale):
    """The paper defines the distribution by its quantile function."""
    t, _ = draw({"name": "mode", "scale": scale}, "flow")
    u = np.linspace(0, 1, 2001)
    quantile = 1 - u - scale * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    assert np.all(np.diff(quantile) <= 1e-12)
    assert ks(t, lambda t: 1 - np.interp(-t, -quantile, u)) < 1.95


def test_cosmap():
    """Density 2 / (pi - 2 pi t + 2 pi t^2), Esser et al. 2024, eq. 22."""
    grid = np.linspace(0, 1, 501)
    density = 2 / (np.pi - 2 * np.pi * grid + 2 * np.pi * grid**2)
    cdf = integrate.cumulative_simpson(density, x=grid, initial=0)
    assert ks(draw("cosmap", "flow")[0], lambda t: np.interp(t, grid, cdf)) < 1.95


def steep(t):
    """Returns a loss that is large at small t."""
    return jnp.exp(-8 * t)


def test_importance_keeps_the_mean_and_lowers_the_variance():
    spec = {"name": "importance", "bins": 20, "history": 4}
    sampler, schedule = build("time_sampling", spec), build("schedules", "vp")
    state, update_state = sampler.initial_state(), jax.jit(sampler.update_state)
    for step in range(40):
        t, _ = sampler.draw(schedule, jax.random.key(step), 64, state)
        state = update_state(state, t, steep(t))
    assert state["counts"].min() >= 4 and state["counts"].sum() == 40 * 64
    t, weight = draw(spec, state=state)
    plain, weighted = np.asarray(steep(draw("uniform")[0])), weight * np.asarray(steep(t))
    assert abs(weighted.mean() - (1 - np.exp(-8)) / 8) < 5 * weighted.std() / N**0.5
    assert weighted.std() < 0.5 * plain.std()
    assert (t < 0.2).mean() > 0.6


def test_importance_stores_the_last_losses_of_each_bin():
    sampler = build("time_sampling", {"name": "importance", "bins": 4, "history": 2})
    t, loss = jnp.array([0.1, 0.25, 0.26, 1.0, 0.2]), jnp.array([1.0, 2.0, 3.0, 4.0, 5.0])
    state = sampler.update_state(sampler.initial_state(), t, loss)
    np.testing.assert_array_equal(state["counts"], [3, 1, 0, 1])
    np.testing.assert_array_equal(state["losses"], [[5, 2], [3, 0], [0, 0], [4, 0]])


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"name": "logit_normal", "std": 0.0}, "std"),
        ({"name": "log_normal", "std": -1.0}, "std"),
        ({"name": "log_normal", "sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min"),
        ({"name": "karras", "rho": 0.0}, "rho"),
        ({"name": "karras", "sigma_min": 80.0}, "sigma_min"),
        ({"name": "mode", "scale": 3.0}, "scale"),
        ({"name": "discrete", "num_steps": 0}, "num_steps"),
        ({"name": "importance", "bins": 0}, "bins"),
        ({"name": "importance", "history": 0}, "history"),
        ({"name": "importance", "uniform_share": 0.0}, "uniform_share"),
    ],
)
def test_bad_options(spec, field):
    with refused(f"time_sampling.{field}"):
        build("time_sampling", spec)
