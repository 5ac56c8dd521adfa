import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests.test_flow_map import MEAN, STD, exact, objective_of

from diffusion.core.arrays import expand
from diffusion.core.build import build
from diffusion.core.types import InputError
from diffusion.layers import attention

ANYWHERE = {"name": "uniform"}


def losses(objective, net, batch, key=None):
    """`[B]`, and the metrics, of a network without parameters."""
    return jax.jit(lambda: objective.loss(net, {"net": None}, {}, batch, key, 0))()


def drawn(objective, batch):
    return jax.jit(objective.draw)(batch, jax.random.key(1), 0, {})


def along_the_ode(schedule, t, n=2):
    """Examples whose path has at t the velocity of the ODE: x0 and the noise are what is expected of x_t."""
    eps = jax.random.normal(jax.random.key(3), (len(t), n), float)
    alpha, sigma = expand(schedule.alpha(t), eps), expand(schedule.sigma(t), eps)
    return MEAN + alpha * STD**2 / sigma * eps, eps


@pytest.mark.parametrize("tangent", ["conditional", "predicted"])
@pytest.mark.parametrize("schedule", ["flow", "trig", "edm"])
def test_exact_average_velocity_is_at_rest(x64, schedule, tangent):
    """u = v - (t - r) du/dt, so there is no error where v is the ODE's own velocity; and there is one elsewhere."""
    objective = objective_of(schedule=schedule, time_sampler=ANYWHERE, tangent=tangent, ratio_r_neq_t=0.75, norm_p=0.0)
    noise = drawn(objective, {"x": jnp.zeros((32, 2))})
    x0, eps = along_the_ode(objective.schedule, noise["t"])
    net = exact(objective.schedule)

    @jax.jit
    def errors(eps, length):
        """Of the network, if what it is told of a step's length is so many times as much."""
        told = lambda params, x, t, cond, key: net(params, x, t, {"step_size": length * cond["step_size"]})  # noqa: E731
        batch = {"x": x0, "cond": {}, "draws": {**noise, "eps": eps}}
        return objective.loss(told, {"net": None}, {}, batch, None, 0)[0]

    right, elsewhere, velocity = errors(eps, 1.0), errors(1.1 * eps, 1.0), errors(eps, 0.0)
    scale = elsewhere.mean()
    np.testing.assert_allclose(right / scale, 0, atol=1e-12)
    assert (elsewhere > 1e4 * right.max()).all()
    # The velocity itself will do for none of the 24 steps.
    assert (velocity[:24] > 1e4 * right.max()).all()
    np.testing.assert_allclose(velocity[24:] / scale, 0, atol=1e-12)


def polynomial(params, x, c_noise, cond, *, key=None):
    """Its derivative is done by hand: of w (x t + h^2), along (v, 1), it is w (v t + x + 2 h)."""
    return params["w"] * (x * expand(c_noise, x) + expand(cond["step_size"] ** 2, x))


@pytest.mark.parametrize("norm_p", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("tangent", ["conditional", "predicted"])
def test_loss_and_gradient_by_hand(x64, tangent, norm_p):
    """No gradient goes through the target, the tangent or the weight."""
    objective = objective_of(time_sampler=ANYWHERE, ratio_r_neq_t=0.5, tangent=tangent, norm_p=norm_p, norm_eps=0.1)
    x0, w = jax.random.normal(jax.random.key(0), (6, 2), float), 0.7
    noise = drawn(objective, {"x": x0})
    batch = {"x": x0, "cond": {}, "draws": noise}

    def loss(params, ema):
        return objective.loss(polynomial, params, ema, batch, None, 0)[0]

    t, r, eps = np.asarray(noise["t"])[:, None], np.asarray(noise["r"])[:, None], np.asarray(noise["eps"])
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


def test_error_is_reported_without_its_weight():
    objective = objective_of(norm_p=1.0)
    batch = {"x": jnp.ones((8, 2)), "cond": {}}
    batch["draws"] = drawn(objective, batch)
    zero = lambda params, x, c_noise, cond, key: 0 * x  # noqa: E731
    _, metrics = losses(objective, zero, batch)
    np.testing.assert_allclose(metrics["error"], jnp.mean((batch["draws"]["eps"] - 1) ** 2), rtol=1e-6)


# Guidance within training.


def by_condition(params, x, c_noise, cond, *, key=None):
    """3 where the condition is kept and -2 where it is not; 10 more for a step, so that one is told from the other."""
    return jnp.where(expand(cond["keep"], x), 3.0, -2.0) + 10 * expand(cond["step_size"] > 0, x) + 0 * x


@pytest.mark.parametrize(("guidance", "kappa"), [(2.5, 0.0), (2.5, 0.92), (1.0, 0.5)])
def test_guided_velocity_by_hand(x64, guidance, kappa):
    """omega v + kappa u(c) + (1 - omega - kappa) u(none), omega = (1 - kappa) guidance, for those who keep their
    condition within the interval."""
    low, high = 0.2, 0.7
    objective = objective_of(time_sampler=ANYWHERE, ratio_r_neq_t=0.0, norm_p=0.0, guidance=guidance, kappa=kappa,
                             interval=(low, high))  # fmt: skip
    keep = jnp.arange(64) % 2 == 0
    batch = {"x": jax.random.normal(jax.random.key(0), (64, 2), float), "cond": {"label": jnp.zeros(64, int)}}
    noise = batch["draws"] = drawn(objective, batch)
    batch["cond"]["keep"] = keep
    loss, _ = losses(objective, by_condition, batch)
    omega, v = (1 - kappa) * guidance, noise["eps"] - batch["x"]
    target = omega * v + kappa * 3 + (1 - omega - kappa) * -2
    changed = keep & (noise["t"] >= low) & (noise["t"] <= high)
    assert 10 < changed.sum() < 32
    output = jnp.where(keep, 3, -2)[:, None]
    expected = jnp.where(changed[:, None], output - target, output - v)
    np.testing.assert_allclose(loss, (expected**2).sum(axis=1), rtol=1e-12)


def test_without_keep_all_are_guided(x64):
    objective = objective_of(ratio_r_neq_t=0.0, norm_p=0.0, guidance=2.0)
    batch = {"x": jnp.ones((4, 2)), "cond": {"label": jnp.zeros(4, int)}}
    batch["draws"] = drawn(objective, batch)
    net = lambda params, x, c_noise, cond, key: by_condition(  # noqa: E731
        params, x, c_noise, {"keep": jnp.ones(len(x), bool), **cond}
    )
    loss, _ = losses(objective, net, batch)
    v = batch["draws"]["eps"] - 1
    np.testing.assert_allclose(loss, ((3 - (2 * v + 2)) ** 2).sum(axis=1), rtol=1e-12)


def test_guidance_is_drawn_for_each_example_and_told(x64):
    objective = objective_of(ratio_r_neq_t=0.5, norm_p=0.0, guidance=(1.0, 5.0))
    assert objective.scalar_conditions == ("step_size", "guidance_scale") and objective_of(
        guidance=2.0
    ).scalar_conditions == ("step_size",)
    batch = {"x": jnp.zeros((2000, 2)), "cond": {"label": jnp.zeros(2000, int), "keep": jnp.ones(2000, bool)}}
    noise = batch["draws"] = drawn(objective, batch)
    scale = noise["guidance"]
    assert 1 <= scale.min() < 1.01 and 4.99 < scale.max() <= 5
    np.testing.assert_allclose([scale.mean(), scale.var()], [3, 4 / 3], atol=0.1)

    def net(params, x, c_noise, cond, *, key=None):
        return by_condition(params, x, 0, {**cond, "step_size": 0 * cond["step_size"]}) + expand(
            cond["guidance_scale"], x
        )

    # v is eps here; dropped it is -2 + w, so that the guided velocity is w eps + (1 - w) (w - 2).
    loss, _ = losses(objective, net, batch)
    w = scale[:, None]
    np.testing.assert_allclose(loss, ((3 + w - (w * noise["eps"] + (1 - w) * (w - 2))) ** 2).sum(axis=1), rtol=1e-9)

    denoise, x, told = objective.denoiser(net, {"net": None}), jnp.zeros((3, 2)), {"keep": jnp.ones(3, bool)}
    at = jnp.float64(0.5)
    np.testing.assert_allclose(denoise(x, at, told).x0, -0.5 * 4)
    np.testing.assert_allclose(
        denoise(x, at, {**told, "guidance_scale": jnp.array([1.0, 2, 4])}).x0[:, 0], [-2, -2.5, -3.5]
    )


def test_dropped_examples_are_not_guided_through_the_tangent():
    """The predicted tangent is that of the example's own condition."""
    objective = objective_of(time_sampler=ANYWHERE, ratio_r_neq_t=1.0, norm_p=0.0, tangent="predicted")
    batch = {"x": jnp.zeros((4, 1)), "cond": {"label": jnp.zeros(4, int), "keep": jnp.array([True, False] * 2)}}
    noise = batch["draws"] = drawn(objective, batch)

    def net(params, x, c_noise, cond, *, key=None):
        return jnp.where(expand(cond["keep"], x), 3.0, -2.0) + x - jax.lax.stop_gradient(x)

    loss, _ = losses(objective, net, batch)
    own = jnp.array([3.0, -2.0] * 2)
    expected = own - (noise["eps"][:, 0] - (noise["t"] - noise["r"]) * own)
    np.testing.assert_allclose(loss, expected**2, rtol=1e-5)


# The draw.


@pytest.mark.parametrize("law", ["uniform", "stratified"])
def test_times_are_the_larger_and_the_smaller_of_two(law):
    objective = objective_of(time_sampler=law, ratio_r_neq_t=0.5)
    noise = drawn(objective, {"x": jnp.zeros((20_000, 1))})
    t, r = noise["t"], noise["r"]
    step = jnp.arange(20_000) < 10_000
    assert ((r < t) == step).all() and (r[10_000:] == t[10_000:]).all()
    # Of two uniform numbers the larger is below u with probability u^2, the smaller above u with (1 - u)^2.
    for u in (0.2, 0.5, 0.8):
        for part in (step, ~step):
            np.testing.assert_allclose(jnp.mean(t < u, where=part), u**2, atol=0.02)
        np.testing.assert_allclose(jnp.mean(r > u, where=step), (1 - u) ** 2, atol=0.02)
    # The length of a step has the law of the distance of two independent numbers: that of neighbours on a lattice is
    # the same for all.
    np.testing.assert_allclose(jnp.mean((t - r)[:10_000] < 0.5), 0.75, atol=0.02)
    assert abs(jnp.corrcoef(t[:9_999], t[1:10_000])[0, 1]) < 0.05


def test_weights_of_the_law_are_multiplied():
    """With importance sampling the two factors make up for both draws."""
    objective = objective_of(time_sampler={"name": "importance", "bins": 4, "history": 2}, ratio_r_neq_t=1.0)
    objective_state = {"losses": jnp.array([[1.0, 1], [2, 2], [4, 4], [1, 1]]), "counts": jnp.full(4, 2)}
    noise = jax.jit(objective.draw)({"x": jnp.zeros((40_000, 1))}, jax.random.key(0), 0, objective_state)
    weight, t, r = noise["weight"], noise["t"], noise["r"]
    for values, mean in ((1.0, 1), (t, 2 / 3), (r, 1 / 3), (t * r, 1 / 4)):
        np.testing.assert_allclose(jnp.mean(weight * values), mean, atol=0.02)


def test_derivative_is_taken_in_forward_mode_alone(monkeypatch):
    """A network on a GPU whose attention has no forward mode chooses another for it, and keeps its own elsewhere."""
    monkeypatch.setattr(attention, "_nvidia_capability", lambda: (9, 0))
    objective, chosen = objective_of(ratio_r_neq_t=0.25), []

    def net(params, x, c_noise, cond, *, key=None):
        q = jnp.zeros((len(x), 4, 1, 8), jnp.bfloat16)
        chosen.append((len(x), attention._choose(q, q, None)))
        return x

    losses(objective, net, {"x": jnp.ones((8, 2)), "cond": {}}, jax.random.key(0))
    assert chosen == [(2, "xla"), (6, "cudnn")]


def test_dropout_is_one_for_the_output_and_its_derivative():
    """Both come from one call, and what is left out of the rest is drawn anew."""
    objective, seen, key = objective_of(ratio_r_neq_t=0.5), [], jax.random.key(5)

    def net(params, x, c_noise, cond, *, key=None):
        seen.append(key)
        return x

    losses(objective, net, {"x": jnp.ones((8, 2)), "cond": {}}, key)
    assert len(seen) == 2 and seen[0] is key and seen[1] is not key


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio_r_neq_t": 1.5}, r"different: must be in \[0, 1\]"),
        ({"norm_p": -1.0}, r"power: must be at least 0"),
        ({"norm_eps": 0.0}, r"constant: must be positive"),
        ({"guidance": (3.0, 1.0)}, r"guidance: must be at least 0, or two"),
        ({"kappa": 1.0}, r"mixing: must be in \[0, 1\)"),
        ({"interval": (0.7, 0.2)}, r"interval: must be two times"),
        ({"tangent": "exact"}, r"tangent: "),
    ],
)
def test_refusals(options, message):
    with pytest.raises(InputError, match=r"^objective\." + message):
        build("objectives", {"name": "mean_flow", **options}, field="objective")
