import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build, names
from diffusion.core.types import InputError
from diffusion.process.decoders import discretized_log_likelihood
from diffusion.process.posterior import posterior
from diffusion.sampling.loop import bind

STD = 0.5


@pytest.mark.parametrize("schedule", ["vp", "ve", "vp_sde"])
@pytest.mark.parametrize("name", names("parameterization"))
def test_loss_at_the_optimum(x64, name, schedule):
    """Data N(0, s^2): the network that turns the optimal denoiser into F leaves exactly the posterior's variance,
    s^2 sigma^2 / (alpha^2 s^2 + sigma^2), divided by c_out^2."""
    objective = build("objectives", {"name": "denoising", "parameterization": name, "schedule": schedule})
    schedule, n = objective.schedule, 200_000
    t = jnp.full((n,), 0.3)
    alpha, sigma, row = schedule.alpha(t), schedule.sigma(t), objective.parameterization(schedule, t)

    def net(params, x, c_noise, cond, *, key=None):
        x_t = x / row.c_in[:, None]
        x0 = alpha[:, None] * STD**2 / (alpha**2 * STD**2 + sigma**2)[:, None] * x_t
        return (x0 - row.c_skip[:, None] * x_t) / row.c_out[:, None]

    x0, eps = STD * jax.random.normal(jax.random.key(0), (n, 1)), jax.random.normal(jax.random.key(1), (n, 1))
    batch = {"x": x0, "cond": {}, "draws": {"t": t, "eps": eps, "weight": jnp.ones(n)}}
    loss, _ = objective.loss(net, {"net": None}, {}, batch, None, jnp.int32(0))
    assert loss.shape == (n,)
    expected = STD**2 * sigma[0] ** 2 / (alpha[0] ** 2 * STD**2 + sigma[0] ** 2) / row.c_out[0] ** 2
    np.testing.assert_allclose(loss.mean(), expected, rtol=4 * (2 / n) ** 0.5)


@pytest.mark.parametrize("name", names("parameterization"))
def test_denoiser_undoes_the_target(x64, name):
    """A network that answers with the target denoises to x0 itself, at a scalar t and at one t an example."""
    objective = build("objectives", {"name": "denoising", "parameterization": name})
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
    given = {**digits_batch, "draws": ddpm.draw(digits_batch, key, 0, {})}
    np.testing.assert_allclose(loss(digits_batch, key), loss(given, key), rtol=1e-6)


@pytest.fixture
def learned(x64):
    spec = {"name": "denoising", "learned_variance": True, "schedule": {"name": "vp", "num_steps": 20}, "levels": 17}
    return build("objectives", spec)


def test_learned_variance_loss_is_the_bound(learned):
    """T times the divergence of two Gaussians, in bits a dimension, times the weight; at the first point of the table
    the decoder's likelihood instead."""
    schedule, n = learned.schedule, 6
    x0, x_t, x0_hat = (jax.random.normal(jax.random.key(i), (n, 3)) for i in range(3))
    x0 = jnp.round(jnp.clip(x0, -1, 1) * 8) / 8
    second = jnp.linspace(-1, 1, n)[:, None] * jnp.ones(3)
    t = jnp.full(n, 5 / 20)
    reverse = posterior(schedule, t[0], t[0] - 1 / 20)
    variance = jnp.exp(reverse.log_variance((second + 1) / 2))
    gap = reverse.from_x0 * (x0 - x0_hat)
    divergence = jnp.log(variance / reverse.beta_tilde) / 2 + (reverse.beta_tilde + gap**2) / (2 * variance) - 0.5
    expected = 0.001 * 20 * divergence.mean(axis=1) / np.log(2)
    np.testing.assert_allclose(learned.second_loss(second, x0_hat, x0, x_t, t), expected, rtol=1e-9)

    first = learned.second_loss(second, x0_hat, x0, x_t, jnp.full(n, 1 / 20))
    clipped = posterior(schedule, jnp.float64(2 / 20), jnp.float64(1 / 20)).beta_tilde
    beta = posterior(schedule, jnp.float64(1 / 20), jnp.float64(0)).beta
    share = (second + 1) / 2
    std = jnp.exp((share * jnp.log(beta) + (1 - share) * jnp.log(clipped)) / 2)
    bits = -discretized_log_likelihood(x0, x0_hat, std, 17).mean(axis=1) / np.log(2)
    np.testing.assert_allclose(first, 0.001 * 20 * bits, rtol=1e-6)


def test_learned_variance_does_not_train_the_mean(learned):
    """Of the two heads the bound trains the second alone; the first has the simple loss."""
    x0, t = jax.random.normal(jax.random.key(0), (4, 2)), jnp.array([0.05, 0.3, 0.7, 1.0])
    batch = {"x": x0, "cond": {}, "draws": {"t": t, "eps": jnp.ones_like(x0), "weight": jnp.ones(4)}}

    def loss(objective, heads):
        return objective.loss(lambda *args, key=None: heads, {"net": None}, {}, batch, None, 0)[0].sum()

    heads = jax.random.normal(jax.random.key(1), (4, 4)) / 3
    both = jax.grad(lambda heads: loss(learned, heads))(heads)
    plain = build("objectives", {"name": "denoising", "schedule": {"name": "vp", "num_steps": 20}})
    alone = jax.grad(lambda heads: loss(plain, heads))(heads[:, :2])
    np.testing.assert_allclose(both[:, :2], alone, rtol=1e-12)
    assert (both[:, 2:] != 0).all()


def test_learned_variance_is_sampled_with(learned):
    """A second head of 1 is beta, one of -1 is beta-tilde."""
    x, keys = jax.random.normal(jax.random.key(0), (3, 2)), jax.random.split(jax.random.key(1), 3)
    for head, name in ((1.0, "beta"), (-1.0, "beta_tilde")):
        heads = jnp.concatenate([x / 2, jnp.full_like(x, head)], axis=-1)
        denoise = bind(learned.denoiser(lambda *args, key=None, heads=heads: heads, {"net": None}), {})
        step = [
            build("samplers", {"name": "ancestral", "variance": variance}).step(
                x, denoise, learned.schedule, jnp.float64(0.5), jnp.float64(0.4), keys
            )
            for variance in ("learned", name)
        ]
        np.testing.assert_allclose(step[0], step[1], rtol=1e-9)


def test_outputs_must_fit(learned, ddpm, tiny_unet):
    with pytest.raises(InputError, match=r"network.outputs: is 1, but the objective needs 2"):
        learned.init(tiny_unet, jax.random.key(0))
    plain = bind(ddpm.denoiser(lambda p, x, c, cond, key=None: x, {"net": None}), {})
    keys = jax.random.split(jax.random.key(1), 1)
    with pytest.raises(InputError, match=r"sampler.variance: the model has learned no variance"):
        build("samplers", {"name": "ancestral", "variance": "learned"}).step(
            jnp.ones((1, 2)), plain, ddpm.schedule, jnp.float32(0.5), jnp.float32(0.4), keys
        )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"schedule": {"name": "vp", "zero_terminal_snr": True}}, "objectives.parameterization: 'eps' does not exist"),
        ({"schedule": "flow", "parameterization": "score"}, "objectives.parameterization: 'score' does not exist"),
        ({"schedule": "ve", "learned_variance": True}, "objectives.learned_variance: needs a schedule with a table"),
        ({"schedule": "learned"}, "objectives.schedule.name: only vdm"),
        ({"schedule": {"name": "vp", "num_steps": 0}}, "objectives.schedule.num_steps: must be at least 1"),
        ({"schedule": {"name": "vp", "beta_end": 1.5}}, "objectives.schedule.beta_end: must be between 0 and 1"),
        ({"schedule": "edm", "time_sampler": "discrete"}, "objectives.time_sampler.num_steps: is missing"),
        ({"schedule": "edm", "parameterization": {"name": "eps", "c_noise": "index"}}, "objectives.*c_noise: 'index'"),
        ({"bound_weight": 0.0}, "objectives.bound_weight: must be positive"),
        ({"levels": 1}, "objectives.levels: must be at least 2"),
    ],
)
def test_impossible_combinations(spec, message):
    with pytest.raises(InputError, match=message):
        build("objectives", {"name": "denoising", **spec})
