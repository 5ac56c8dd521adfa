import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.build import build, names
from diffusion.types import InputError

SCHEDULES = [{"name": "vp", "betas": betas, "num_steps": 100} for betas in ("linear", "scaled_linear", "cosine")]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s["betas"])
@pytest.mark.parametrize("name", names("parameterization"))
def test_rows_read_both_ways(x64, name, schedule):
    """The target read back through c_skip and c_out is x0 itself."""
    schedule = build("schedules", schedule)
    t = jnp.linspace(0.001, 0.99, 99)
    row = build("parameterization", name)(schedule, t)
    x0, eps = jax.random.normal(jax.random.key(0), (2, 99))
    x_t = schedule.alpha(t) * x0 + schedule.sigma(t) * eps
    target = row.a * x0 + row.b * eps
    scale = 1 + abs(row.c_skip) + abs(row.c_out)  # what rounding is multiplied by
    np.testing.assert_allclose((row.c_skip * x_t + row.c_out * target - x0) / scale, 0, atol=1e-12)
    determinant = schedule.alpha(t) * row.b - schedule.sigma(t) * row.a
    np.testing.assert_allclose(row.c_skip * determinant, row.b, atol=1e-12)
    np.testing.assert_allclose(row.c_out * determinant, -schedule.sigma(t), atol=1e-12)


def test_targets_are_the_papers():
    schedule = build("schedules", "vp")
    t = jnp.array([0.25])
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    for name, a, b in (("eps", 0, 1), ("x0", 1, 0), ("v", -sigma, alpha)):
        row = build("parameterization", name)(schedule, t)
        assert row.a == a and row.b == b


@pytest.mark.parametrize("name", names("parameterization"))
def test_data_end_is_exact(name):
    """At t = 0 every row says that x_t is x0."""
    schedule = build("schedules", "vp")
    row = build("parameterization", name)(schedule, jnp.zeros(()))
    assert np.isfinite([row.c_skip, row.c_out, row.a, row.b]).all()
    if name != "x0":  # whose output is x0 itself
        assert row.c_skip == 1 and row.c_out == 0


def test_noise_label():
    schedule = build("schedules", {"name": "vp", "num_steps": 50})
    t = jnp.array([1 / 50, 1.0])
    np.testing.assert_allclose(build("parameterization", "eps")(schedule, t).c_noise, [20, 1000])
    index = build("parameterization", {"name": "eps", "c_noise": "index"})(schedule, t)
    np.testing.assert_allclose(index.c_noise, [0, 49], atol=1e-5)
    with pytest.raises(InputError, match="c_noise"):
        build("parameterization", {"name": "eps", "c_noise": "index"})(_NoTable(), t)


class _NoTable:
    """A schedule without a table."""

    def alpha(self, t):
        return 1 - t

    sigma = alpha
