import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build

# The tables as defined in their papers.
BETAS = {
    "linear": lambda T: np.linspace(1e-4, 0.02, T),
    "scaled_linear": lambda T: np.linspace(0.00085**0.5, 0.012**0.5, T) ** 2,
    "cosine": lambda T: np.array(
        [
            min(1 - np.cos(((i + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
                / np.cos((i / T + 0.008) / 1.008 * np.pi / 2) ** 2, 0.999)
            for i in range(T)
        ]
    ),
}  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 10, 1000])
@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("is_given", [False, True])
def test_table(x64, betas, num_steps, is_given):
    table = BETAS[betas](num_steps)
    given = {"trained_betas": tuple(table.tolist())} if is_given else {"betas": betas}
    schedule = build("schedules", {"name": "vp", "num_steps": num_steps, **given})
    alpha_bar = np.cumprod(1 - table)
    t = jnp.arange(1, num_steps + 1) / num_steps
    np.testing.assert_allclose(schedule.alpha(t) ** 2, alpha_bar, rtol=1e-11)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, 1 - alpha_bar, rtol=1e-11)
    np.testing.assert_allclose(schedule.log_snr(t), np.log(alpha_bar / (1 - alpha_bar)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("betas", BETAS)
def test_between_and_below_the_points(x64, betas):
    schedule = build("schedules", {"name": "vp", "betas": betas, "num_steps": 50})
    assert schedule.alpha(jnp.float64(0)) == 1 and schedule.sigma(jnp.float64(0)) == 0
    assert schedule.log_snr(jnp.float64(0)) == np.inf and schedule.time(jnp.float64(np.inf)) == 0
    t = jnp.linspace(0, 1, 1234)
    log_snr = schedule.log_snr(t)
    assert np.all(np.diff(log_snr) < 0)
    np.testing.assert_allclose(schedule.time(log_snr), t, atol=1e-12)
    np.testing.assert_allclose(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2, 1, rtol=1e-14)
    middle = (schedule.log_snr(jnp.float64(3 / 50)) + schedule.log_snr(jnp.float64(4 / 50))) / 2
    np.testing.assert_allclose(
        schedule.log_snr(jnp.float64(3.5 / 50)), middle, rtol=1e-12
    )  # log-SNR is linear between the points


def test_float32_and_shapes():
    schedule = build("schedules", "vp")
    for shape in [(), (3,), (2, 2)]:
        t = jnp.full(shape, 0.3, jnp.float32)
        for value in (schedule.alpha(t), schedule.sigma(t), schedule.log_snr(t), schedule.time(t)):
            assert value.shape == shape and value.dtype == jnp.float32
