"""Denoising diffusion: DDPM, its learned variance, and the parameterizations on all schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build, names
from diffusion.process import parameterization
from diffusion.process.decoders import discretized_log_likelihood
from diffusion.process.posterior import posterior
from diffusion.sampling.loop import bind
from tests.refusals import refused
from tests.tiers import slow_except

STD = 0.5


@pytest.mark.parametrize("schedule", slow_except(("vp",), ("vp", "ve", "vp_sde")))
@pytest.mark.parametrize("name", names("parameterization"))
def test_loss_at_the_optimum(x64, name, schedule):
    """For data N(0, s^2), the loss of the optimal denoiser is the posterior variance, s^2 sigma^2 / (alpha^2 s^2 +
    sigma^2), divided by c_out^2."""
    objective = build("objectives", {"name": "denoising", "parameterization": name, "schedule": schedule})
    schedule, n = objective.schedule, 200_000
    t = jnp.full((n,), 0.3)
    alpha, sigma, coeffs = schedule.alpha(t), schedule.sigma(t), objective.parameterization(schedule, t)

    def net(params, x, c_noise, cond, *, key=None):
        x_t = x / coeffs.c_in[:, None]
        x0 = alpha[:, None] * STD**2 / (alpha**2 * STD**2 + sigma**2)[:, None] * x_t
        return (x0 - coeffs.c_skip[:, None] * x_t) / coeffs.c_out[:, None]

    x0, eps = STD * jax.random.normal(jax.random.key(0), (n, 1)), jax.random.normal(jax.random.key(1), (n, 1))
    batch = {"x": x0, "cond": {}, "draws": {"t": t, "eps": eps, "weight": jnp.ones(n)}}
    loss = jax.jit(lambda batch: objective.loss(net, {"net": None}, {}, batch, None, jnp.int32(0))[0])(batch)
    assert loss.shape == (n,)
    expected = STD**2 * sigma[0] ** 2 / (alpha[0] ** 2 * STD**2 + sigma[0] ** 2) / coeffs.c_out[0] ** 2
    np.testing.assert_allclose(loss.mean(), expected, rtol=4 * (2 / n) ** 0.5)


@pytest.mark.parametrize("name", names("parameterization"))
def test_denoiser_inverts_the_target(x64, name):
    """A network that outputs the target denoises to x0, for a scalar t and for one t per example."""
    objective = build("objectives", {"name": "denoising", "parameterization": name})
    x0, eps = jax.random.normal(jax.random.key(0), (2, 5, 3))
    for t in (jnp.float64(0.4), jnp.linspace(0.1, 0.9, 5)):
        times = jnp.broadcast_to(t, 5)
        alpha, sigma = objective.schedule.alpha(times)[:, None], objective.schedule.sigma(times)[:, None]
        coeffs = objective.parameterization(objective.schedule, times)
        target = coeffs.a[:, None] * x0 + coeffs.b[:, None] * eps
        seen = {}

        def net(params, x, c_noise, cond, *, key=None, target=target, seen=seen):
            seen.update(c_noise=c_noise, key=key)
            return target

        denoised = objective.denoiser(net, {"net": None})(alpha * x0 + sigma * eps, t, {})
        np.testing.assert_allclose(denoised.x0, x0, atol=1e-10)
        np.testing.assert_allclose(seen["c_noise"], coeffs.c_noise)
        assert seen["key"] is None  # no dropout in sampling


def test_parts_may_be_given_as_callables():
    schedule = build("schedules", "edm")
    spec = {"name": "denoising", "schedule": lambda: schedule, "parameterization": parameterization.eps}
    objective = build("objectives", spec)
    assert objective.schedule is schedule
    with refused("objectives.schedule"):
        build("objectives", {"name": "denoising", "schedule": 3})


def test_draw_gives_each_example_its_own_noise(ddpm, digits_batch):
    draws = ddpm.draw(digits_batch, jax.random.key(0), 0, {})
    assert draws["t"].shape == (16,) and draws["eps"].shape == digits_batch["x"].shape
    assert len(np.unique(draws["t"])) == 16 and abs(draws["eps"].std() - 1) < 0.1


@pytest.fixture
def learned(x64):
    spec = {"name": "denoising", "learned_variance": True, "schedule": {"name": "vp", "num_steps": 20}, "levels": 17}
    return build("objectives", spec)


def test_learned_variance_loss_is_the_bound(learned):
    """It is the weight times T times the divergence of two Gaussians in bits per dimension; at the first point of the
    table it is the decoder's negative log-likelihood instead."""
    schedule, n = learned.schedule, 6
    x0, x0_hat = (jax.random.normal(jax.random.key(i), (n, 3)) for i in (0, 2))
    x0 = jnp.round(jnp.clip(x0, -1, 1) * 8) / 8
    second = jnp.linspace(-1, 1, n)[:, None] * jnp.ones(3)
    t = jnp.full(n, 5 / 20)
    reverse = posterior(schedule, t[0], t[0] - 1 / 20)
    variance = jnp.exp(reverse.log_variance((second + 1) / 2))
    gap = reverse.from_x0 * (x0 - x0_hat)
    divergence = jnp.log(variance / reverse.beta_tilde) / 2 + (reverse.beta_tilde + gap**2) / (2 * variance) - 0.5
    expected = 0.001 * 20 * divergence.mean(axis=1) / np.log(2)
    variance_loss = jax.jit(learned.variance_loss)
    np.testing.assert_allclose(variance_loss(second, x0_hat, x0, t), expected, rtol=1e-9)

    first = variance_loss(second, x0_hat, x0, jnp.full(n, 1 / 20))
    clipped = posterior(schedule, jnp.float64(2 / 20), jnp.float64(1 / 20)).beta_tilde
    beta = posterior(schedule, jnp.float64(1 / 20), jnp.float64(0)).beta
    share = (second + 1) / 2
    std = jnp.exp((share * jnp.log(beta) + (1 - share) * jnp.log(clipped)) / 2)
    bits = -discretized_log_likelihood(x0, x0_hat, std, 17).mean(axis=1) / np.log(2)
    np.testing.assert_allclose(first, 0.001 * 20 * bits, rtol=1e-6)


def test_learned_variance_does_not_train_the_mean(learned):
    """The bound trains the second output alone; the first has the simple loss."""
    x0, t = jax.random.normal(jax.random.key(0), (4, 2)), jnp.array([0.05, 0.3, 0.7, 1.0])
    batch = {"x": x0, "cond": {}, "draws": {"t": t, "eps": jnp.ones_like(x0), "weight": jnp.ones(4)}}

    def loss(objective, heads):
        return objective.loss(lambda *args, key=None: heads, {"net": None}, {}, batch, None, 0)[0].sum()

    heads = jax.random.normal(jax.random.key(1), (4, 4)) / 3
    both = jax.jit(jax.grad(lambda heads: loss(learned, heads)))(heads)
    plain = build("objectives", {"name": "denoising", "schedule": {"name": "vp", "num_steps": 20}})
    alone = jax.jit(jax.grad(lambda heads: loss(plain, heads)))(heads[:, :2])
    np.testing.assert_allclose(both[:, :2], alone, rtol=1e-12)
    assert (both[:, 2:] != 0).all()


def test_learned_variance_is_used_in_sampling(learned):
    """A second output of 1 stands for beta, and -1 for beta-tilde."""
    x, keys = jax.random.normal(jax.random.key(0), (3, 2)), jax.random.split(jax.random.key(1), 3)
    for head, name in ((1.0, "beta"), (-1.0, "beta_tilde")):
        heads = jnp.concatenate([x / 2, jnp.full_like(x, head)], axis=-1)
        denoise = bind(learned.denoiser(lambda *args, key=None, heads=heads: heads, {"net": None}), {})
        step = [
            build("samplers", {"name": "ancestral", "variance": variance}).step(
                x, (), denoise, learned.schedule, jnp.float64(0.5), jnp.float64(0.4), keys
            )[0]
            for variance in ("learned", name)
        ]
        np.testing.assert_allclose(step[0], step[1], rtol=1e-9)


def test_network_and_sampler_must_match_the_outputs(learned, ddpm, tiny_unet):
    with refused("network.outputs"):
        learned.init(tiny_unet, jax.random.key(0))
    plain = bind(ddpm.denoiser(lambda p, x, c, cond, key=None: x, {"net": None}), {})
    keys = jax.random.split(jax.random.key(1), 1)
    with refused("sampler.variance"):
        build("samplers", {"name": "ancestral", "variance": "learned"}).step(
            jnp.ones((1, 2)), (), plain, ddpm.schedule, jnp.float32(0.5), jnp.float32(0.4), keys
        )


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"schedule": {"name": "vp", "zero_terminal_snr": True}}, "objectives.parameterization"),
        ({"schedule": "flow", "parameterization": "score"}, "objectives.parameterization"),
        ({"schedule": "ve", "learned_variance": True}, "objectives.learned_variance"),
        ({"schedule": {"name": "vp", "num_steps": 1}, "learned_variance": True}, "objectives.learned_variance"),
        ({"schedule": "learned"}, "objectives.schedule.name"),
        ({"schedule": {"name": "vp", "num_steps": 0}}, "objectives.schedule.num_steps"),
        ({"schedule": {"name": "vp", "beta_end": 1.5}}, "objectives.schedule.beta_end"),
        ({"schedule": "edm", "time_sampler": "discrete"}, "objectives.time_sampler.num_steps"),
        ({"schedule": "edm", "parameterization": {"name": "eps", "c_noise": "index"}}, "objectives.c_noise"),
        ({"bound_weight": 0.0}, "objectives.bound_weight"),
        ({"offset_noise": -0.1}, "objectives.offset_noise"),
        ({"pyramid_noise": 1.0}, "objectives.pyramid_noise"),
        ({"input_perturbation": -0.1}, "objectives.input_perturbation"),
        ({"levels": 1}, "objectives.levels"),
    ],
)
def test_invalid_options_are_rejected(spec, field):
    with refused(field):
        build("objectives", {"name": "denoising", **spec})
