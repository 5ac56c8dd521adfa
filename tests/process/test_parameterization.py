import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import derivative
from diffusion.core.build import build, names
from diffusion.core.types import InputError

SCHEDULES = ["vp", {"name": "vp", "betas": "cosine"}, {"name": "vp", "zero_terminal_snr": True}, "vp_sde", "ve", "edm",
             "flow", {"name": "flow", "shift": 3.0}, "trig"]  # fmt: skip
ROWS = names("parameterization")


def at(schedule, t=None):
    """A schedule, times inside it, and its coefficients there."""
    schedule = build("schedules", schedule)
    t = jnp.linspace(0.01, 0.97, 99) if t is None else t
    return schedule, t, schedule.alpha(t), schedule.sigma(t)


def pair():
    x0, eps = jax.random.normal(jax.random.key(0), (2, 99))
    return x0, eps


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_rows_read_both_ways(x64, name, schedule):
    """The target read back through c_skip and c_out is x0 itself, and both are the general solution."""
    schedule, t, alpha, sigma = at(schedule)
    row = build("parameterization", name)(schedule, t)
    x0, eps = pair()
    x_t = alpha * x0 + sigma * eps
    # Rounding is that of the two terms, which for large sigma / alpha nearly cancel.
    terms = abs(row.c_skip * x_t) + abs(row.c_out * row.target(x0, eps)) + 1
    np.testing.assert_allclose((row.to_x0(row.target(x0, eps), x_t) - x0) / terms, 0, atol=1e-12)
    determinant = alpha * row.b - sigma * row.a
    np.testing.assert_allclose(row.c_skip * determinant / row.b, 1, atol=1e-12) if name != "x0" else None
    np.testing.assert_allclose(row.c_out * determinant / sigma, -1, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_every_row_converts_into_every_other(x64, name, schedule):
    schedule, t, alpha, sigma = at(schedule)
    x0, eps = pair()
    x_t = alpha * x0 + sigma * eps
    first = build("parameterization", name)(schedule, t)
    for other in ROWS:
        second = build("parameterization", other)(schedule, t)
        converted = second.from_x0(first.to_x0(first.target(x0, eps), x_t), x_t, alpha, sigma)
        # c_out of the first over c_out of the second is what an error is multiplied by.
        gain = 1 + abs(first.c_out / second.c_out) * (1 + abs(first.target(x0, eps))) + abs(second.b / sigma * x_t)
        np.testing.assert_allclose((converted - second.target(x0, eps)) / gain, 0, atol=1e-12)


def test_targets_are_the_papers(x64):
    schedule, t, alpha, sigma = at("trig", jnp.array([0.25, 0.7]))
    x0, eps = jnp.array([0.3, -0.2]), jnp.array([1.0, -2.0])
    expected = {
        "eps": eps,
        "x0": x0,
        "v": alpha * eps - sigma * x0,
        "velocity": derivative(lambda t: schedule.alpha(t) * x0 + schedule.sigma(t) * eps, t),
        "score": -eps / sigma,
    }
    for name, target in expected.items():
        np.testing.assert_allclose(build("parameterization", name)(schedule, t).target(x0, eps), target, rtol=1e-12)


@pytest.mark.parametrize("name", ["edm", "consistency"])
def test_edm_is_karras_table_1(x64, name):
    """On EDM's schedule, the paper's four coefficients; input and target of unit variance."""
    data, low = 0.6, 0.05
    keywords = {"name": name, "sigma_data": data, **({"sigma_min": low} if name == "consistency" else {})}
    schedule, t, _, sigma = at("edm", jnp.array([0.01, 0.3, 1.0]))
    row = build("parameterization", keywords)(schedule, t)
    above = sigma - low if name == "consistency" else sigma
    np.testing.assert_allclose(row.c_skip, data**2 / (above**2 + data**2), rtol=1e-12)
    np.testing.assert_allclose(row.c_out, above * data / np.sqrt(sigma**2 + data**2), rtol=1e-12)
    np.testing.assert_allclose(row.c_in, 1 / np.sqrt(sigma**2 + data**2), rtol=1e-12)
    np.testing.assert_allclose(row.c_noise, np.log(sigma) / 4, rtol=1e-12)
    if name == "edm":
        np.testing.assert_allclose(row.a**2 * data**2 + row.b**2, 1, rtol=1e-12)


def test_edm_does_not_depend_on_the_scale_of_the_path(x64):
    """At one sigma / alpha, every schedule gives the network the same input and means the same by its output."""
    log_snr = jnp.array([3.0, 0.0, -5.0])
    x0, eps = jnp.array([0.3, -0.2, 0.9]), jnp.array([1.0, -2.0, 0.1])
    seen = []
    for name in ("edm", "vp", "flow", "trig"):
        schedule = build("schedules", name)
        t = schedule.time(log_snr)
        row = build("parameterization", "edm")(schedule, t)
        x_t = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
        seen.append(np.stack([row.c_in * x_t, row.target(x0, eps), row.c_noise]))
    for other in seen[1:]:
        np.testing.assert_allclose(other, seen[0], rtol=1e-9, atol=1e-12)


def test_consistency_boundary_is_exact():
    """f(x, sigma_min) = x, bit for bit, whatever the network says."""
    schedule = build("schedules", {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0})
    t = schedule.time(-2 * jnp.log(jnp.float32(0.002)))
    row = build("parameterization", {"name": "consistency", "sigma_min": float(schedule.sigma(t))})(schedule, t)
    assert row.c_skip == 1 and row.c_out == 0


@pytest.mark.parametrize("name", ["eps", "x0", "v", "velocity", "edm"])
@pytest.mark.parametrize("schedule", ["vp", "flow", "trig", "edm", {"name": "vp", "zero_terminal_snr": True}], ids=str)
def test_data_end_is_exact(name, schedule):
    """At t = 0 every row says that x_t is x0."""
    row = build("parameterization", {"name": name, "c_noise": "time"})(build("schedules", schedule), jnp.zeros(()))
    assert np.isfinite([row.c_skip, row.c_out, row.a, row.b]).all()
    if name != "x0":  # whose output is x0 itself
        np.testing.assert_allclose(row.c_skip, 1, rtol=1e-6)
        assert row.c_out == 0


@pytest.mark.parametrize("name", ["x0", "v", "velocity", "edm", "consistency"])
@pytest.mark.parametrize("schedule", ["flow", "trig", {"name": "vp", "zero_terminal_snr": True}], ids=str)
def test_noise_end_is_finite(name, schedule):
    """At zero SNR the rows that exist have finite coefficients."""
    row = build("parameterization", {"name": name, "c_noise": "time"})(build("schedules", schedule), jnp.ones(()))
    assert np.isfinite(list(vars(row).values())).all()


def test_inputs_keep_unit_scale():
    """Variance exploding inputs are scaled down; all others reach the network as they are."""
    for name in ("eps", "x0", "v", "velocity", "score"):
        for schedule in ("vp", "flow", "trig"):
            built, t, _, _ = at(schedule)
            np.testing.assert_allclose(build("parameterization", name)(built, t).c_in, 1, rtol=1e-6)
        built, t, _, sigma = at("ve")
        np.testing.assert_allclose(build("parameterization", name)(built, t).c_in, (1 + sigma**2) ** -0.5, rtol=1e-5)


def test_noise_label():
    schedule = build("schedules", {"name": "vp", "num_steps": 50})
    t = jnp.array([1 / 50, 1.0])
    np.testing.assert_allclose(build("parameterization", "eps")(schedule, t).c_noise, [20, 1000])
    index = build("parameterization", {"name": "eps", "c_noise": "index"})(schedule, t)
    np.testing.assert_allclose(index.c_noise, [0, 49], atol=1e-5)
    with pytest.raises(InputError, match="c_noise"):
        build("parameterization", {"name": "eps", "c_noise": "index"})(build("schedules", "flow"), t)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"name": "edm", "sigma_data": 0.0}, "sigma_data"),
        ({"name": "consistency", "sigma_data": -1.0}, "sigma_data"),
        ({"name": "consistency", "sigma_min": -0.1}, "sigma_min"),
        ({"name": "eps", "c_noise": "clock"}, "c_noise"),
    ],
)
def test_bad_options(spec, field):
    with pytest.raises(InputError, match=f"parameterization.{field}: "):
        build("parameterization", spec)
