import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.build import build, names

STD = 0.5


@pytest.mark.parametrize("name", names("parameterization"))
def test_loss_at_the_optimum(x64, name):
    """Data N(0, s^2): the network that turns the optimal denoiser into F leaves exactly the posterior's variance,
    s^2 sigma^2 / (alpha^2 s^2 + sigma^2), divided by c_out^2."""
    objective = build("objectives", {"name": "ddpm", "parameterization": name})
    schedule, n = objective.schedule, 200_000
    t = jnp.full((n,), 0.3)
    alpha, sigma, row = schedule.alpha(t), schedule.sigma(t), objective.parameterization(schedule, t)

    def net(params, x, c_noise, cond, *, key=None):
        x_t = x / row.c_in[:, None]
        x0 = alpha[:, None] * STD**2 / (alpha**2 * STD**2 + sigma**2)[:, None] * x_t
        return (x0 - row.c_skip[:, None] * x_t) / row.c_out[:, None]

    x0, eps = STD * jax.random.normal(jax.random.key(0), (n, 1)), jax.random.normal(jax.random.key(1), (n, 1))
    batch = {"x": x0, "cond": {}, "noise": {"t": t, "eps": eps, "weight": jnp.ones(n)}}
    loss, _ = objective.loss(net, {"net": None}, {}, batch, None, jnp.int32(0))
    assert loss.shape == (n,)
    expected = STD**2 * sigma[0] ** 2 / (alpha[0] ** 2 * STD**2 + sigma[0] ** 2) / row.c_out[0] ** 2
    np.testing.assert_allclose(loss.mean(), expected, rtol=4 * (2 / n) ** 0.5)


@pytest.mark.parametrize("name", names("parameterization"))
def test_denoiser_undoes_the_target(x64, name):
    """A network that answers with the target denoises to x0 itself, at a scalar t and at one t an example."""
    objective = build("objectives", {"name": "ddpm", "parameterization": name})
    x0, eps = jax.random.normal(jax.random.key(0), (2, 5, 3))
    for t in (jnp.float64(0.4), jnp.linspace(0.1, 0.9, 5)):
        times = jnp.broadcast_to(t, 5)
        alpha, sigma = objective.schedule.alpha(times)[:, None], objective.schedule.sigma(times)[:, None]
        row = objective.parameterization(objective.schedule, times)
        target = row.a[:, None] * x0 + row.b[:, None] * eps
        seen = {}

        def net(params, x, c_noise, cond, *, key=None, target=target, seen=seen):
            seen.update(c_noise=c_noise, key=key)
            return target

        denoised = objective.denoiser(net, {"net": None})(alpha * x0 + sigma * eps, t, {})
        np.testing.assert_allclose(denoised.x0, x0, atol=1e-10)
        np.testing.assert_allclose(seen["c_noise"], row.c_noise)
        assert seen["key"] is None  # no dropout in sampling


def test_draw_gives_each_example_its_own_noise(ddpm, digits_batch):
    noise = ddpm.draw(digits_batch, jax.random.key(0), 0, {})
    assert noise["t"].shape == (16,) and noise["eps"].shape == digits_batch["x"].shape
    assert len(np.unique(noise["t"])) == 16 and abs(noise["eps"].std() - 1) < 0.1


def test_loss_draws_its_noise_from_the_key(ddpm, digits_batch, tiny_unet, tiny_params):
    loss = jax.jit(lambda batch, key: ddpm.loss(tiny_unet.apply, tiny_params, {}, batch, key, 0)[0])
    key = jax.random.key(5)
    given = {**digits_batch, "noise": ddpm.draw(digits_batch, key, 0, {})}
    np.testing.assert_allclose(loss(digits_batch, key), loss(given, key), rtol=1e-6)
