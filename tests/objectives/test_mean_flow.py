"""MeanFlow, compared with closed forms for Gaussian data and with derivatives computed manually."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import expand
from diffusion.layers import attention
from tests.objectives.drawing import with_draws
from tests.objectives.test_average_velocity import MEAN, STD, exact, objective_of
from tests.refusals import refused
from tests.tiers import slow_except

UNIFORM = {"name": "uniform"}


def losses(objective, net, batch, key=None):
    """Returns the losses `[B]` and the metrics of a network without parameters."""
    return jax.jit(lambda: objective.loss(net, {"net": None}, {}, batch, key, 0))()


def drawn(objective, batch):
    return jax.jit(objective.draw)(batch, jax.random.key(1), 0, {})


def along_the_ode(schedule, t, n=2):
    """Returns examples whose path has the velocity of the ODE at t: x0 and eps are their expectations given x_t."""
    eps = jax.random.normal(jax.random.key(3), (len(t), n), float)
    alpha, sigma = expand(schedule.alpha(t), eps), expand(schedule.sigma(t), eps)
    return MEAN + alpha * STD**2 / sigma * eps, eps


@pytest.mark.parametrize("tangent", ["conditional", "predicted"])
@pytest.mark.parametrize("schedule", slow_except(("trig",), ("flow", "trig", "edm")))
def test_loss_is_zero_for_the_exact_average_velocity(x64, schedule, tangent):
    """u = v - (t - r) du/dt, so the error is 0 where v is the velocity of the ODE, and not 0 elsewhere."""
    objective = objective_of(schedule=schedule, time_sampler=UNIFORM, tangent=tangent, ratio_r_neq_t=0.75, norm_p=0.0)
    draws = drawn(objective, {"x": jnp.zeros((32, 2))})
    x0, eps = along_the_ode(objective.schedule, draws["t"])
    net = exact(objective.schedule)

    @jax.jit
    def errors(eps, length):
        """Returns the errors of the network if the step size that it receives is multiplied by `length`."""
        scaled = lambda params, x, t, cond, key: net(params, x, t, {"step_size": length * cond["step_size"]})  # noqa: E731
        batch = {"x": x0, "cond": {}, "draws": {**draws, "eps": eps}}
        return objective.loss(scaled, {"net": None}, {}, batch, None, 0)[0]

    right, elsewhere, velocity = errors(eps, 1.0), errors(1.1 * eps, 1.0), errors(eps, 0.0)
    scale = elsewhere.mean()
    np.testing.assert_allclose(right / scale, 0, atol=1e-12)
    assert (elsewhere > 1e4 * right.max()).all()
    # The instantaneous velocity is wrong for all 24 steps.
    assert (velocity[:24] > 1e4 * right.max()).all()
    np.testing.assert_allclose(velocity[24:] / scale, 0, atol=1e-12)


def polynomial(params, x, c_noise, cond, *, key=None):
    """Returns w (x t + h^2), whose derivative along (v, 1) is w (v t + x + 2 h)."""
    return params["w"] * (x * expand(c_noise, x) + expand(cond["step_size"] ** 2, x))


@pytest.mark.parametrize("norm_p", slow_except((0.75,), (0.0, 0.75, 1.0)))
@pytest.mark.parametrize("tangent", ["conditional", "predicted"])
def test_loss_and_gradient_match_a_manual_computation(x64, tangent, norm_p):
    """The target, the tangent and the weight receive no gradient."""
    objective = objective_of(time_sampler=UNIFORM, ratio_r_neq_t=0.5, tangent=tangent, norm_p=norm_p, norm_eps=0.1)
    x0, w = jax.random.normal(jax.random.key(0), (6, 2), float), 0.7
    draws = drawn(objective, {"x": x0})
    batch = {"x": x0, "cond": {}, "draws": draws}

    def loss(params, ema):
        return objective.loss(polynomial, params, ema, batch, None, 0)[0]

    t, r, eps = np.asarray(draws["t"])[:, None], np.asarray(draws["r"])[:, None], np.asarray(draws["eps"])
    assert (r[:3] < t[:3]).all() and (r[3:] == t[3:]).all()
    x, v, h = (1 - t) * x0 + t * eps, eps - x0, t - r
    along = v if tangent == "conditional" else w * x * t
    slope = w * (along * t + x + 2 * h)
    difference = w * (x * t + h**2) - (v - h * slope)
    error = (difference**2).sum(axis=1)
    weight = (error + 0.1) ** -norm_p
    params = {"net": {"w": w}}
    np.testing.assert_allclose(jax.jit(loss)(params, params), weight * error, rtol=1e-12)
    own, of_average = jax.jit(jax.jacobian(loss, argnums=(0, 1)))(params, params)
    np.testing.assert_allclose(own["net"]["w"], weight * (2 * difference * (x * t + h**2)).sum(axis=1), rtol=1e-12)
    assert (of_average["net"]["w"] == 0).all()


def test_logged_error_is_unweighted():
    objective = objective_of(norm_p=1.0)
    batch = {"x": jnp.ones((8, 2)), "cond": {}}
    batch["draws"] = drawn(objective, batch)
    zero = lambda params, x, c_noise, cond, key: 0 * x  # noqa: E731
    _, metrics = losses(objective, zero, batch)
    np.testing.assert_allclose(metrics["error"], jnp.mean((batch["draws"]["eps"] - 1) ** 2), rtol=1e-6)


# Guidance within training.


def by_condition(params, x, c_noise, cond, *, key=None):
    """Returns 3 where the condition is kept and -2 where it is dropped, and 10 more for steps, to distinguish them."""
    return jnp.where(expand(cond["keep"], x), 3.0, -2.0) + 10 * expand(cond["step_size"] > 0, x) + 0 * x


@pytest.mark.parametrize(("guidance", "kappa"), slow_except([(2.5, 0.92)], [(2.5, 0.0), (2.5, 0.92), (1.0, 0.5)]))
def test_guided_velocity_matches_a_manual_computation(x64, guidance, kappa):
    """It is omega v + kappa u(c) + (1 - omega - kappa) u(none), omega = (1 - kappa) guidance, for examples that keep
    their condition and lie in the interval."""
    low, high = 0.2, 0.7
    objective = objective_of(time_sampler=UNIFORM, ratio_r_neq_t=0.0, norm_p=0.0, guidance=guidance, kappa=kappa,
                             interval=(low, high))  # fmt: skip
    keep = jnp.arange(64) % 2 == 0
    batch = {"x": jax.random.normal(jax.random.key(0), (64, 2), float), "cond": {"label": jnp.zeros(64, int)}}
    draws = batch["draws"] = drawn(objective, batch)
    batch["cond"]["keep"] = keep
    loss, _ = losses(objective, by_condition, batch)
    omega, v = (1 - kappa) * guidance, draws["eps"] - batch["x"]
    target = omega * v + kappa * 3 + (1 - omega - kappa) * -2
    changed = keep & (draws["t"] >= low) & (draws["t"] <= high)
    assert 10 < changed.sum() < 32
    output = jnp.where(keep, 3, -2)[:, None]
    expected = jnp.where(changed[:, None], output - target, output - v)
    np.testing.assert_allclose(loss, (expected**2).sum(axis=1), rtol=1e-12)


def test_all_examples_are_guided_without_keep(x64):
    objective = objective_of(ratio_r_neq_t=0.0, norm_p=0.0, guidance=2.0)
    batch = {"x": jnp.ones((4, 2)), "cond": {"label": jnp.zeros(4, int)}}
    batch["draws"] = drawn(objective, batch)
    net = lambda params, x, c_noise, cond, key: by_condition(  # noqa: E731
        params, x, c_noise, {"keep": jnp.ones(len(x), bool), **cond}
    )
    loss, _ = losses(objective, net, batch)
    v = batch["draws"]["eps"] - 1
    np.testing.assert_allclose(loss, ((3 - (2 * v + 2)) ** 2).sum(axis=1), rtol=1e-12)


@pytest.mark.slow
def test_guidance_scale_is_drawn_per_example_and_given_to_the_network(x64):
    objective = objective_of(ratio_r_neq_t=0.5, norm_p=0.0, guidance=(1.0, 5.0))
    assert objective.scalar_conditions == ("step_size", "guidance_scale") and objective_of(
        guidance=2.0
    ).scalar_conditions == ("step_size",)
    batch = {"x": jnp.zeros((2000, 2)), "cond": {"label": jnp.zeros(2000, int), "keep": jnp.ones(2000, bool)}}
    draws = batch["draws"] = drawn(objective, batch)
    scale = draws["guidance"]
    assert 1 <= scale.min() < 1.01 and 4.99 < scale.max() <= 5
    np.testing.assert_allclose([scale.mean(), scale.var()], [3, 4 / 3], atol=0.1)

    def net(params, x, c_noise, cond, *, key=None):
        return by_condition(params, x, 0, {**cond, "step_size": 0 * cond["step_size"]}) + expand(
            cond["guidance_scale"], x
        )

    # v is eps, and the unconditional output is -2 + w, so the guided velocity is w eps + (1 - w) (w - 2).
    loss, _ = losses(objective, net, batch)
    w = scale[:, None]
    np.testing.assert_allclose(loss, ((3 + w - (w * draws["eps"] + (1 - w) * (w - 2))) ** 2).sum(axis=1), rtol=1e-9)

    denoise, x, cond = objective.denoiser(net, {"net": None}), jnp.zeros((3, 2)), {"keep": jnp.ones(3, bool)}
    at = jnp.float64(0.5)
    np.testing.assert_allclose(denoise(x, at, cond).x0, -0.5 * 4)
    np.testing.assert_allclose(
        denoise(x, at, {**cond, "guidance_scale": jnp.array([1.0, 2, 4])}).x0[:, 0], [-2, -2.5, -3.5]
    )


def test_predicted_tangent_uses_the_condition_of_the_example():
    """It does not guide examples whose condition is dropped."""
    objective = objective_of(time_sampler=UNIFORM, ratio_r_neq_t=1.0, norm_p=0.0, tangent="predicted")
    batch = {"x": jnp.zeros((4, 1)), "cond": {"label": jnp.zeros(4, int), "keep": jnp.array([True, False] * 2)}}
    draws = batch["draws"] = drawn(objective, batch)

    def net(params, x, c_noise, cond, *, key=None):
        return jnp.where(expand(cond["keep"], x), 3.0, -2.0) + x - jax.lax.stop_gradient(x)

    loss, _ = losses(objective, net, batch)
    own = jnp.array([3.0, -2.0] * 2)
    expected = own - (draws["eps"][:, 0] - (draws["t"] - draws["r"]) * own)
    np.testing.assert_allclose(loss, expected**2, rtol=1e-5)


# The draw.


@pytest.mark.parametrize("time_sampler", slow_except(("stratified",), ("uniform", "stratified")))
def test_times_are_the_larger_and_the_smaller_of_two(time_sampler):
    objective = objective_of(time_sampler=time_sampler, ratio_r_neq_t=0.5)
    draws = drawn(objective, {"x": jnp.zeros((20_000, 1))})
    t, r = draws["t"], draws["r"]
    step = jnp.arange(20_000) < 10_000
    assert ((r < t) == step).all() and (r[10_000:] == t[10_000:]).all()
    # Of two uniform numbers the larger is below u with probability u^2, the smaller above u with (1 - u)^2.
    for u in (0.2, 0.5, 0.8):
        for part in (step, ~step):
            np.testing.assert_allclose(jnp.mean(t < u, where=part), u**2, atol=0.02)
        np.testing.assert_allclose(jnp.mean(r > u, where=step), (1 - u) ** 2, atol=0.02)
    # The length of a step is distributed as the distance of two independent numbers. Without shuffling, a stratified
    # sampler would give neighbours on a lattice, all at the same distance.
    np.testing.assert_allclose(jnp.mean((t - r)[:10_000] < 0.5), 0.75, atol=0.02)
    assert abs(jnp.corrcoef(t[:9_999], t[1:10_000])[0, 1]) < 0.05


def test_importance_weights_of_both_times_are_multiplied():
    """The product corrects for the importance sampling of both draws."""
    objective = objective_of(time_sampler={"name": "importance", "bins": 4, "history": 2}, ratio_r_neq_t=1.0)
    objective_state = {"losses": jnp.array([[1.0, 1], [2, 2], [4, 4], [1, 1]]), "counts": jnp.full(4, 2)}
    draws = jax.jit(objective.draw)({"x": jnp.zeros((40_000, 1))}, jax.random.key(0), 0, objective_state)
    weight, t, r = draws["weight"], draws["t"], draws["r"]
    for values, mean in ((1.0, 1), (t, 2 / 3), (r, 1 / 3), (t * r, 1 / 4)):
        np.testing.assert_allclose(jnp.mean(weight * values), mean, atol=0.02)


def test_forward_mode_applies_to_the_derivative_alone(monkeypatch):
    """On a GPU, attention without forward-mode derivatives is replaced for the derivative, and used elsewhere."""
    monkeypatch.setattr(attention, "_nvidia_capability", lambda: (9, 0))
    objective, chosen = objective_of(ratio_r_neq_t=0.25), []

    def net(params, x, c_noise, cond, *, key=None):
        q = jnp.zeros((len(x), 4, 1, 8), jnp.bfloat16)
        chosen.append((len(x), attention.choose_kernel(q, q, None)))
        return x

    key = jax.random.key(0)
    losses(objective, net, with_draws(objective, {"x": jnp.ones((8, 2)), "cond": {}}, key), key)
    assert chosen == [(2, "xla"), (6, "cudnn")]


def test_output_and_derivative_share_the_dropout():
    """Both come from one call. The other examples have different dropout."""
    objective, seen, key = objective_of(ratio_r_neq_t=0.5), [], jax.random.key(5)

    def net(params, x, c_noise, cond, *, key=None):
        seen.append(key)
        return x

    losses(objective, net, with_draws(objective, {"x": jnp.ones((8, 2)), "cond": {}}, key), key)
    assert len(seen) == 2 and seen[0] is key and seen[1] is not key


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"ratio_r_neq_t": 1.5}, "objective.ratio_r_neq_t"),
        ({"norm_p": -1.0}, "objective.norm_p"),
        ({"norm_eps": 0.0}, "objective.norm_eps"),
        ({"guidance": (3.0, 1.0)}, "objective.guidance"),
        ({"kappa": 1.0}, "objective.kappa"),
        ({"interval": (0.7, 0.2)}, "objective.interval"),
        ({"tangent": "exact"}, "objective.tangent"),
    ],
)
def test_invalid_options_are_rejected(options, field):
    with refused(field):
        objective_of(**options)
