"""Consistency models in continuous time, compared with closed forms and with the algorithm of the paper."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import expand
from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Network, Spec
from diffusion.objectives.base import uncertainty
from diffusion.objectives.base.teacher import Teacher
from diffusion.objectives.continuous_consistency import normalized, tangent
from diffusion.process.analytic import Mixture
from diffusion.training import ema, optimizer
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from tests.objectives.drawing import with_draws
from tests.process.gaussian_ode import gaussian_ode_map
from tests.refusals import refused
from tests.tiers import slow_except

SIGMA = 0.75
TRIG = build("schedules", {"name": "trig", "sigma_data": SIGMA})
EDM = {"name": "edm", "sigma_data": SIGMA, "c_noise": "unit"}
FLOW = build("objectives", {"name": "flow_matching", "schedule": {"name": "trig", "sigma_data": SIGMA},
                            "parameterization": EDM})  # fmt: skip
MEAN, STD = 0.3, 0.5  # of the Gaussian data; SIGMA deliberately differs from STD
DATA = Mixture([[MEAN, MEAN]], [STD], [1.0])


def objective_of(**options):
    return build("objectives", {"name": "continuous_consistency", "sigma_data": SIGMA, "warmup": 0, **options})


def at(t, x):
    return expand(TRIG.alpha(t), x), expand(TRIG.sigma(t), x)


def outputs_of(x0_of):
    """Returns the network whose x0, in the parameterization `edm`, is `x0_of(x, t)`."""

    def net(params, x, c_noise, cond, *, key=None):
        x, t = x * SIGMA, c_noise
        alpha, sigma = at(t, x)
        return (x0_of(x, t) - alpha * x) / sigma

    return net


@outputs_of
def exact(x, t):
    return gaussian_ode_map(x, MEAN, STD, TRIG.alpha(t), TRIG.sigma(t), 1.0, 0.0)


@outputs_of
def posterior_mean(x, t):
    return DATA.denoise(x, TRIG.alpha(t), TRIG.sigma(t))


ANALYTIC = Teacher(Network(lambda key: {}, posterior_mean), FLOW, Spec(ArraySpec((2,), "points", low=-1.0, high=1.0)))


def velocity(x, t):
    """Returns dx/dtheta of the ODE, from the posterior mean."""
    alpha, sigma = at(t, x)
    x0 = DATA.denoise(x, TRIG.alpha(t), TRIG.sigma(t))
    return SIGMA * alpha * (x - alpha * x0) / sigma - sigma / SIGMA * x0


# The tangent.


def test_exact_map_has_no_tangent(x64):
    """It is constant along the ODE. The posterior mean is not, and neither is the exact map along another path."""
    t = jnp.linspace(0.01, 1, 50)
    x = jax.random.normal(jax.random.key(0), (50, 2))

    @jax.jit
    def slopes(x, t):
        def slope(net, along):
            return tangent(lambda x, t: net(None, x / SIGMA, t, {}), TRIG, SIGMA, x, t, along)[1]

        along = velocity(x, t)
        return slope(exact, along), slope(posterior_mean, along), slope(exact, 1.1 * along)

    still, *moving = slopes(x, t)
    np.testing.assert_allclose(still, 0, atol=1e-12)
    assert all(jnp.abs(slope).max() > 0.1 for slope in moving)


def test_distillation_loss_is_zero_for_the_exact_map(x64):
    """With an analytic teacher the exact map has no tangent, and hence no gradient."""
    objective = objective_of(teacher=ANALYTIC, adaptive=False)
    key = jax.random.key(1)
    batch = with_draws(objective, {"x": DATA.sample(jax.random.key(0), 64), "cond": {}}, key)

    def loss_of(net):
        return objective.loss(net, {"net": {}, "teacher": {"net": {}}}, {}, batch, key, 0)

    (loss, metrics), (_, elsewhere) = jax.jit(lambda: (loss_of(exact), loss_of(posterior_mean)))()
    np.testing.assert_allclose(loss, 0, atol=1e-18)
    np.testing.assert_allclose(metrics["tangent_rms"], 0, atol=1e-9)
    assert elsewhere["tangent_rms"] > 0.05


@pytest.fixture(scope="module")
def mlp():
    network = build("networks", {"name": "mlp", "width": 8, "depth": 1}, shape=(2,))
    params = jax.jit(network.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    return network, jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) / 4, params)


@pytest.mark.parametrize("name", slow_except(("mlp",), ("mlp", "unet")))
def test_tangent_is_the_derivative_along_the_path(name, mlp, tiny_unet, tiny_params, digits_batch):
    """Compares with fourth-order central differences of f in theta; the U-Net has attention."""
    if name == "mlp":
        network, params = mlp
        x0, cond = jax.random.normal(jax.random.key(2), (16, 2)), {}
    else:
        network, params = tiny_unet, tiny_params["net"]
        x0, cond = digits_batch["x"], digits_batch["cond"]
    eps = SIGMA * jax.random.normal(jax.random.key(1), x0.shape)
    theta = jnp.linspace(0.1, 1.5, 16)

    def on_path(theta):
        wide = expand(theta, x0)
        return jnp.cos(wide) * x0 + jnp.sin(wide) * eps, 2 / jnp.pi * theta

    def output(x, t):
        return network.apply(params, x / SIGMA, t, cond)

    @jax.jit
    def end(theta):
        x, t = on_path(theta)
        return jnp.cos(expand(theta, x)) * x + SIGMA * jnp.sin(expand(theta, x)) * output(x, t)

    h = 0.01
    near, far = (end(theta + step) - end(theta - step) for step in (h, 2 * h))
    expected = (8 * near - far) / (12 * h)
    wide = expand(theta, x0)
    along = jnp.cos(wide) * eps - jnp.sin(wide) * x0
    x, t = on_path(theta)
    value, slope = jax.jit(lambda x, t, along: tangent(output, TRIG, SIGMA, x, t, along))(x, t, along)
    assert jnp.abs(expected).max() > 1
    np.testing.assert_allclose(slope, expected, atol=1e-4)
    np.testing.assert_allclose(value, output(x, t), atol=1e-5)


@pytest.mark.slow
def test_ramp_scales_the_unstable_term(x64):
    t = jnp.linspace(0.01, 1, 7)
    x, along = jax.random.normal(jax.random.key(0), (2, 7, 2))

    def of(ramp):
        return tangent(lambda x, t: exact(None, x / SIGMA, t, {}), TRIG, SIGMA, x, t, along, ramp)[1]

    alpha, _ = at(t, x)
    np.testing.assert_allclose(of(0.0), alpha * (along + SIGMA * exact(None, x / SIGMA, t, {})), rtol=1e-12)
    np.testing.assert_allclose(of(0.25), 0.75 * of(0.0) + 0.25 * of(1.0), atol=1e-12)


def test_normalized_tangent():
    g = jnp.array([[3.0, -4.0], [0.3, 0.4], [0.0, 0.0]])
    rms = np.sqrt([[12.5], [0.125], [0.0]])
    np.testing.assert_allclose(normalized(g, "norm"), g / (rms + 0.1), rtol=1e-6)
    np.testing.assert_allclose(normalized(g, "clip"), [[1, -1], [0.3, 0.4], [0, 0]])
    wide = jnp.tile(g, 50)  # the same image with more pixels
    np.testing.assert_allclose(normalized(wide, "norm")[:, :2], normalized(g, "norm"), rtol=1e-6)
    root = np.sqrt([[25.0], [0.25], [0.0]])
    np.testing.assert_allclose(normalized(g, "vector_norm"), g / (root + 0.1), rtol=1e-6)


# The loss.


def linear(params, x, c_noise, cond, *, key=None):
    return params["w"] * x + params["b"] * c_noise[:, None]


@pytest.mark.parametrize(("step", "ramp"), slow_except([(3, 0.3)], [(0, 0.0), (3, 0.3), (25, 1.0)]))
@pytest.mark.parametrize("normalize", ["norm", "clip"])
@pytest.mark.parametrize("distilled", [False, True])
def test_gradient_matches_the_paper(x64, step, ramp, normalize, distilled):
    """Compares with algorithm 1 of arXiv 2410.11081, computed for a linear network with the paper's signs,
    F = -(w x + b t)."""
    objective = objective_of(warmup=10, normalize=normalize, teacher=ANALYTIC if distilled else None)
    w, b = 0.7, -0.4
    kernel = 0.1 * jax.random.normal(jax.random.key(3), (128,))
    params = {"net": {"w": jnp.float64(w), "b": jnp.float64(b)}, "weight": {"kernel": kernel}}
    params |= {"teacher": {"net": {"unused": jnp.float64(1)}}} if distilled else {}
    batch = {"x": DATA.sample(jax.random.key(0), 5), "cond": {}}
    draws = objective.draw(batch, jax.random.key(1), step, {})

    def total(params):
        return objective.loss(linear, params, {}, {**batch, "draws": draws}, None, step)[0].sum()

    found = jax.jit(jax.grad(total))(params)

    x0, z, theta = np.asarray(batch["x"]), SIGMA * np.asarray(draws["eps"]), np.asarray(draws["t"])[:, None] * np.pi / 2
    cos, sin = np.cos(theta), np.sin(theta)
    x = cos * x0 + sin * z
    along = np.asarray(velocity(x, jnp.asarray(theta[:, 0]) * 2 / np.pi)) if distilled else cos * z - sin * x0
    output = -(w * x / SIGMA + b * theta * 2 / np.pi)
    d_output = -(w * along / SIGMA + b * 2 / np.pi)
    g = -(cos**2) * (SIGMA * output - along) - ramp * cos * sin * (x + SIGMA * d_output)
    g = np.clip(g, -1, 1) if normalize == "clip" else g / (np.sqrt((g**2).mean(1, keepdims=True)) + 0.1)
    label = np.log(SIGMA * np.tan(theta[:, 0])) / 4
    frequencies = np.random.RandomState(0).randn(64).astype(np.float32)
    angles = 2 * np.pi * label[:, None] * frequencies
    features = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    log_weight = features @ np.asarray(kernel)
    # d/d theta e^w / D |F - F^- - g|^2 = -2 e^w / D g . dF / d theta
    pull = -2 * np.exp(log_weight)[:, None] / 2 * g
    np.testing.assert_allclose(found["net"]["w"], (pull * -x / SIGMA).sum(), rtol=1e-5)
    np.testing.assert_allclose(found["net"]["b"], (pull * -theta * 2 / np.pi).sum(), rtol=1e-5)
    missing = np.exp(log_weight) * (g**2).mean(1) - 1
    np.testing.assert_allclose(found["weight"]["kernel"], missing @ features, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(total(params), (missing + 1 - log_weight).sum(), rtol=1e-5)
    if distilled:
        assert found["teacher"]["net"]["unused"] == 0


def test_weight_is_one_unless_adaptive():
    objective = objective_of(adaptive=False)
    batch = {"x": jax.random.normal(jax.random.key(0), (5, 2)), "cond": {}}
    batch["draws"] = objective.draw(batch, jax.random.key(1), 0, {})
    params = {"net": {"w": jnp.float32(0.7), "b": jnp.float32(0.2)}}
    zero = {**params, "weight": {"kernel": jnp.zeros(128)}}
    both = objective, dataclasses.replace(objective, adaptive=True)
    loss, learned = jax.jit(lambda: [o.loss(linear, zero, {}, batch, None, 0)[0] for o in both])()
    np.testing.assert_allclose(loss, learned)
    assert (loss > 0.1).any() and "weight" not in objective.init(Network(lambda key: {}, linear), None)


@pytest.mark.parametrize("adaptive", [False, True])
def test_prior_weighting(x64, adaptive):
    """The error is multiplied by 1 / (sigma_data tan(theta)) before the learned weight."""
    batch = {"x": jax.random.normal(jax.random.key(0), (5, 2)), "cond": {}}
    params = {"net": {"w": 0.7, "b": 0.2}, "weight": {"kernel": jnp.cos(jnp.arange(128.0)) / 30}}
    plain, weighted = (objective_of(adaptive=adaptive, prior_weighting=prior) for prior in (False, True))
    batch["draws"] = plain.draw(batch, jax.random.key(1), 0, {})
    t = batch["draws"]["t"]
    prior = 1 / (SIGMA * np.tan(np.pi / 2 * np.asarray(t)))
    u = uncertainty.log_error(params["weight"], plain.schedule, t) if adaptive else 0
    without, found = (objective.loss(linear, params, {}, batch, None, 0)[0] for objective in (plain, weighted))
    np.testing.assert_allclose(found - u, prior * (without - u), rtol=1e-6)


def test_learned_weight_depends_on_the_noise_level_and_is_finite_at_both_ends():
    objective = objective_of()
    t = jnp.array([1e-30, 1e-3, 0.1, 0.9, 1.0])
    kernel = jax.random.normal(jax.random.key(0), (128,))
    found = uncertainty.log_error({"kernel": kernel}, objective.schedule, t)
    assert np.isfinite(found).all() and np.diff(np.sort(found)).min() > 0.1


def test_teacher_receives_no_gradient(mlp):
    """The teacher is a network with parameters."""
    network, trained = mlp
    teacher = Teacher(network, FLOW, Spec(ArraySpec((2,), "points")))
    objective = objective_of(teacher=teacher)
    params = objective.init(network, jax.random.key(1), {"net": trained})
    key = jax.random.key(1)
    batch = with_draws(objective, {"x": jax.random.normal(jax.random.key(0), (8, 2)), "cond": {}}, key, step=5)

    def total(params):
        return objective.loss(network.apply, params, {}, batch, key, 5)[0].sum()

    gradient = jax.jit(jax.grad(total))(params)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient["teacher"]))
    assert jnp.abs(gradient["weight"]["kernel"]).max() > 0
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient["net"])) > 1e-3


def test_frozen_copy_has_the_same_dropout():
    """Then the two outputs cancel, and the error is that of the tangent alone."""
    objective = objective_of(adaptive=False, normalize="clip")
    seen = []

    def net(params, x, c_noise, cond, *, key=None):
        seen.append(key)
        return x * jax.random.bernoulli(key, 0.5, x.shape) * params["w"]

    batch = {"x": jax.random.normal(jax.random.key(0), (64, 2)), "cond": {}}
    batch["draws"] = objective.draw(batch, jax.random.key(1), 0, {})
    params = {"net": {"w": jnp.float32(100)}}
    loss = jax.jit(lambda: objective.loss(net, params, {}, batch, jax.random.key(2), 0)[0])()
    assert len(seen) == 2 and (loss <= 1 + 1e-3).all()


def test_times_are_log_normal_in_the_noise_level():
    """tan(theta) = e^tau / sigma_data, tau ~ N(mean, std^2)."""
    objective = objective_of(mean=-0.7, std=1.1)
    t = objective.draw({"x": jnp.zeros((20_000, 1))}, jax.random.key(0), 0, {})["t"]
    tau = jnp.log(SIGMA * jnp.tan(jnp.pi / 2 * t))
    np.testing.assert_allclose([tau.mean(), tau.std()], [-0.7, 1.1], atol=0.03)


# The model.


@pytest.mark.parametrize("sigma_data", [0.5, 0.7, 0.75, 1.0, 1.3])
def test_boundary_is_exact(sigma_data, mlp):
    """f(x, 0) = x bit for bit in float32, for every magnitude of x."""
    network, params = mlp
    denoise = objective_of(sigma_data=sigma_data).denoiser(network.apply, {"net": params})
    x = jax.random.normal(jax.random.key(0), (256, 2)) * jnp.logspace(-6, 4, 256)[:, None]
    denoised = jax.jit(denoise)(x, jnp.float32(0), {})
    assert denoised.kind == "consistency"
    np.testing.assert_array_equal(np.asarray(denoised.x0).view(np.uint32), np.asarray(x).view(np.uint32))


def test_denoiser_is_the_map_of_the_paper(mlp):
    network, params = mlp
    x, t = jax.random.normal(jax.random.key(0), (9, 2)), jnp.linspace(0.05, 1, 9)
    theta = np.asarray(t)[:, None] * np.pi / 2
    output = -network.apply(params, x / SIGMA, t, {})
    found = objective_of().denoiser(network.apply, {"net": params})(x, t, {}).x0
    np.testing.assert_allclose(found, np.cos(theta) * x - np.sin(theta) * SIGMA * output, atol=1e-5)


def test_student_starts_from_its_teacher_which_stays_fixed(mlp):
    """Runs the train step with its state donated. The learned weight is trained and averaged with the network."""
    network, trained = mlp
    objective = objective_of(teacher=Teacher(network, FLOW, Spec(ArraySpec((2,), "points"))))
    opt, averages = (
        optimizer.make_optimizer(steps=9, name="sgd", learning_rate=0.1),
        ema.make_ema(decays=(0.5,), warmup=False),
    )
    theirs = {"net": jax.tree.map(jnp.array, trained)}
    state = init_state(objective, network, opt, averages, jax.random.key(0), theirs)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.params)]
    assert len(set(places)) == len(places)  # no buffer is donated twice
    for name in (state.params["net"], state.params["teacher"]["net"]):
        jax.tree.map(np.testing.assert_array_equal, name, trained)
    step = jax.jit(make_step(objective, network, opt, averages, seed=0), donate_argnums=0)
    state, _ = step(state, {"x": jax.random.normal(jax.random.key(0), (8, 2)), "cond": {}})
    jax.tree.map(np.testing.assert_array_equal, state.params["teacher"]["net"], trained)
    assert set(state.ema["0.5"]) == {"net", "weight"}
    kernel = state.params["weight"]["kernel"]
    assert jnp.abs(kernel).max() > 0
    np.testing.assert_allclose(state.ema["0.5"]["weight"]["kernel"], kernel / 2, rtol=1e-5)


def test_teacher_may_provide_only_the_initial_weights(mlp):
    network, trained = mlp
    objective = objective_of(teacher=Teacher(network, FLOW, Spec(ArraySpec((2,), "points"))), distill=False)
    params = objective.init(network, jax.random.key(0), {"net": trained})
    assert objective.frozen == () and set(params) == {"net", "weight"}
    jax.tree.map(np.testing.assert_array_equal, params["net"], trained)
    key = jax.random.key(1)
    batch = with_draws(objective, {"x": jax.random.normal(jax.random.key(0), (8, 2)), "cond": {}}, key)
    both = objective, objective_of()
    found, expected = jax.jit(lambda: [o.loss(network.apply, params, {}, batch, key, 0)[0] for o in both])()
    np.testing.assert_array_equal(found, expected)


def teacher_of(**spec):
    spec = {"name": "flow_matching", "schedule": {"name": "trig", "sigma_data": SIGMA}, "parameterization": EDM, **spec}
    return Teacher(ANALYTIC.network, build("objectives", spec), ANALYTIC.spec)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"sigma_data": 0.0}, "objectives.sigma_data"),
        ({"std": 0.0}, "objectives.std"),
        ({"warmup": -1}, "objectives.warmup"),
        ({"normalize": "none"}, "objectives.normalize"),
        ({"teacher": teacher_of(schedule="trig")}, "objectives.teacher"),
        ({"teacher": teacher_of(parameterization="v")}, "objectives.teacher"),
        ({"teacher": teacher_of(parameterization={**EDM, "c_noise": "time"})}, "objectives.teacher"),
        ({"teacher": dataclasses.replace(ANALYTIC, objective=objective_of(adaptive=False))}, "objectives.teacher"),
    ],
)
def test_invalid_options_are_rejected(options, field):
    with refused(field):
        objective_of(**options)
