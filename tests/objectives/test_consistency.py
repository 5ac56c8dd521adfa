"""Consistency models in discrete time, compared with the closed form for Gaussian data: for data N(m, s^2) the path
through x at level sigma ends at m + (x - m) sqrt((s^2 + eps^2) / (s^2 + sigma^2)) at level eps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.stats import norm

from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Denoised, Network, Spec, class_labels
from diffusion.objectives.base import discretization
from diffusion.objectives.base.teacher import Teacher
from diffusion.process import time_sampling
from diffusion.process.analytic import Mixture
from tests.objectives.drawing import with_draws
from tests.refusals import refused
from tests.tiers import slow_except

MEAN, STD, LOWEST = 0.3, 0.6, 0.002
EDM = {"name": "edm", "sigma_min": 0.002, "sigma_max": 80.0}
COEFFICIENTS = {"name": "consistency", "sigma_data": 0.5, "sigma_min": LOWEST}
RATIO = {"name": "ratio", "every": 10}


def objective_of(**options):
    spec = {
        "name": "consistency",
        "discretization": {"name": "fixed"},
        "schedule": EDM,
        "parameterization": COEFFICIENTS,
    }
    return build("objectives", {**spec, **options}, field="objective")


def path_end(x, level, mean=MEAN, std=STD):
    return mean + (x - mean) * jnp.sqrt((std**2 + LOWEST**2) / (std**2 + level**2))


def network_of(objective, x0_of):
    """Returns a network whose x0 is `x0_of(x, level)`."""

    def net(params, scaled, c_noise, cond, *, key=None):
        level = jnp.exp(4 * c_noise)[:, None]
        coeffs = objective.parameterization(objective.schedule, level / 80)
        x = scaled / coeffs.c_in
        return jnp.where(coeffs.c_out > 0, (x0_of(x, level) - coeffs.c_skip * x) / coeffs.c_out, 0)

    return net


class Exact:
    """An objective whose denoiser is the posterior mean of N(m, s^2)."""

    frozen, schedule = (), build("schedules", EDM)

    def init(self, network, key, teacher=None):
        return {"net": {"unused": jnp.zeros(())}}

    def denoiser(self, net, params):
        mixture = Mixture(np.array([[MEAN]]), np.array([STD]), np.ones(1)).denoiser(self.schedule)
        return lambda x, t, cond: Denoised(mixture(x, t).x0 + 0 * params["net"]["unused"])


TEACHER = Teacher(Network(None, None), Exact(), Spec(ArraySpec((1,), "points")), cond_drop_rate=0.0)
PARAMS = {"net": {"unused": 0.0}, "teacher": {"net": {"unused": 0.0}}, "target": {"unused": 0.0}}


def batch_of(n, seed=0):
    return {"x": MEAN + STD * jax.random.normal(jax.random.key(seed), (n, 1)), "cond": {}}


def posterior_mean(x, level):
    return (STD**2 * x + level**2 * MEAN) / (STD**2 + level**2)


@pytest.mark.slow
def test_exact_map_agrees_at_both_ends_of_a_step(x64):
    """It does along the teacher's ODE, up to the error of Heun steps; the posterior mean does not."""
    objective = objective_of(
        discretization={"name": "fixed", "points": 80},
        solver="heun",
        teacher=TEACHER,
        metric="l2",
        weighting="one",
        time_sampler="karras",
    )
    key = jax.random.key(0)
    batch = with_draws(objective, batch_of(512), key)
    loss = jax.jit(lambda is_exact: objective.loss(
        network_of(objective, lambda x, level: jnp.where(is_exact, path_end(x, level), posterior_mean(x, level))),
        PARAMS, PARAMS, batch, key, jnp.int32(0),
    )[0])  # fmt: skip
    exact, mean = (float(jnp.sqrt(jnp.max(loss(is_exact)))) for is_exact in (True, False))
    assert exact < 5e-4 < 0.02 < mean


ORDERS = [("euler", 0.8, 1.2), ("ddim", 0.8, 1.2), ("heun", 1.8, 2.3)]


@pytest.mark.parametrize(("solver", "least", "most"), slow_except(ORDERS[2:], ORDERS))
def test_order_of_the_solvers(x64, solver, least, most):
    """The error at the end of the whole path from 80 to 0.002, in N steps of the karras grid."""
    errors = []
    for points in (41, 81):
        objective = objective_of(discretization={"name": "fixed", "points": points}, solver=solver, teacher=TEACHER)
        denoise = objective.teacher_denoiser(None, PARAMS, PARAMS)

        @jax.jit
        def step(x, t, objective=objective, denoise=denoise):
            t, r = objective.discretization.pair(objective.schedule, 0.999 * t, objective.t_min, jnp.int32(0))
            return objective.solver_step(denoise, x, t, r, {}), r

        x, t = jnp.array([[50.0]]), jnp.ones(1)
        for _ in range(points - 1):
            x, t = step(x, t)
        errors.append(float(abs(x - path_end(50.0, 80.0))[0, 0]))
    assert least < np.log2(errors[0] / errors[1]) < most


@pytest.fixture(scope="module")
def mlp(digits):
    return build("networks", {"name": "mlp", "width": 8, "depth": 1}, shape=digits.spec.shape, num_classes=10)


@pytest.fixture(scope="module")
def mlp_params(mlp):
    """Returns parameters of which none is zero."""
    return {"net": jax.tree.map(lambda leaf: leaf + 0.1, jax.jit(mlp.init)(jax.random.key(0)))}


BOUNDARIES = [
    (EDM, COEFFICIENTS, LOWEST),
    (EDM, {"name": "consistency", "sigma_data": 0.7, "sigma_min": 0.01}, 0.01),
    (EDM, {"name": "edm", "sigma_data": 0.7}, 0.0),
    ("flow", "velocity", 0.0),
    ("trig", "v", 0.0),
    ({"name": "vp", "betas": "cosine"}, "v", 0.0),
    ("vp_sde", "eps", 0.0),
]


@pytest.mark.parametrize(
    ("schedule", "parameterization", "sigma_min"), slow_except(BOUNDARIES[1:4], BOUNDARIES), ids=str
)
def test_boundary_is_exact_bit_for_bit(schedule, parameterization, sigma_min, mlp, mlp_params, digits_batch):
    objective = objective_of(
        schedule=schedule, parameterization=parameterization, sigma_min=sigma_min, discretization=RATIO
    )
    x, t = digits_batch["x"] + 0.123, jnp.full(16, objective.t_min)
    denoise = jax.jit(lambda x, t: objective.denoiser(mlp.apply, mlp_params)(x, t, digits_batch["cond"]))
    denoised = denoise(x, t)
    assert denoised.kind == "consistency"
    np.testing.assert_array_equal(denoised.x0, x)
    assert (np.asarray(denoise(x, t + 1e-3).x0) != np.asarray(x)).any()


TRAINED = {
    "ict": {"discretization": {"name": "doubling", "steps": 600, "start": 10, "end": 80}, "sigma_min": LOWEST},
    "ect": {"discretization": {"name": "ratio", "every": 100}, "parameterization": {"name": "edm"}, "sigma_min": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_training_on_a_gaussian_learns_the_closed_form(name):
    objective = objective_of(
        **TRAINED[name], time_sampler={"name": "log_normal", "mean": -0.5, "std": 1.5, "sigma_min": 0.002}
    )
    network = build("networks", {"name": "mlp", "width": 32, "depth": 2}, shape=(1,))
    params = objective.init(network, jax.random.key(0))
    rate = optax.cosine_decay_schedule(5e-3, 700)
    opt = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    @jax.jit
    def train(params, state):
        def one(carry, step):
            params, state = carry
            key = jax.random.fold_in(jax.random.key(1), step)
            batch = {"x": MEAN + STD * jax.random.normal(key, (512, 1)), "cond": {}}
            key = jax.random.fold_in(key, 1)
            batch = with_draws(objective, batch, key, step)
            grads = jax.grad(lambda p: jnp.mean(objective.loss(network.apply, p, p, batch, key, step)[0]))(params)
            updates, state = opt.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(one, (params, state), jnp.arange(700))[0]

    params, _ = train(params, opt.init(params))
    level = jnp.repeat(jnp.array([0.1, 0.5, 2.0, 10.0]), 101)[:, None]
    x = MEAN + jnp.sqrt(STD**2 + level**2) * jnp.tile(jnp.linspace(-2, 2, 101), 4)[:, None]
    got = objective.denoiser(network.apply, params)(x, level[:, 0] / 80, {}).x0
    # The posterior mean differs from it by 0.55 at the highest level, and by 0.2 on average.
    assert float(jnp.sqrt(jnp.mean((got - path_end(x, level)) ** 2))) < 0.06


def test_an_example_whose_condition_is_dropped_follows_the_unconditional_ode():
    """The guided teacher has the x0 -1 without the label, and -1 + 3 (2 - -1) = 8 with it."""

    class Labelled(Exact):
        def denoiser(self, net, params):
            return lambda x, t, cond: Denoised(jnp.where(cond.get("keep", True), 2.0, -1.0)[..., None] + 0 * x)

    teacher = Teacher(Network(None, None), Labelled(), Spec(ArraySpec((1,), "points"), class_labels(2)), 0.1)
    objective = objective_of(solver="ddim", guidance=3.0, teacher=teacher)
    cond = {"label": jnp.array([1, 1]), "keep": jnp.array([True, False])}
    x, t, r = jnp.ones((2, 1)), jnp.full(2, 10 / 80), jnp.full(2, 5 / 80)
    stepped = objective.solver_step(objective.teacher_denoiser(None, {"teacher": {}}, {}), x, t, r, cond)
    np.testing.assert_allclose(stepped[:, 0], [(1 + 8) / 2, (1 - 1) / 2], atol=1e-5)  # half way to x0 at half the level


@pytest.mark.slow
def test_target_teacher_and_average_receive_no_gradient(mlp, mlp_params, digits_batch):
    teacher = Teacher(mlp, build("objectives", {"name": "denoising", "schedule": EDM, "parameterization": "edm"}),
                      Spec(ArraySpec((8, 8, 1)), class_labels(10)), 0.1)  # fmt: skip
    options = {"solver": "heun", "teacher": teacher, "guidance": 2.0}
    averaged, own = objective_of(**options, target="average"), objective_of(**options)
    params = {"net": mlp_params["net"], "target": jax.tree.map(lambda p: 0.9 * p, mlp_params["net"]),
              "teacher": mlp_params}  # fmt: skip
    draws = averaged.draw(digits_batch, jax.random.key(0), jnp.int32(0), {})
    batch = {**digits_batch, "draws": draws}

    def loss(objective):
        return lambda params, ema: objective.loss(mlp.apply, params, ema, batch, None, jnp.int32(0))[0].mean()

    grads, of_average = jax.jit(jax.grad(loss(averaged), argnums=(0, 1)))(params, params)
    sizes = {name: float(optax.global_norm(grads[name])) for name in grads}
    assert sizes["net"] > 0.01 and sizes["target"] == sizes["teacher"] == optax.global_norm(of_average) == 0
    # If the student is its own target, the gradient is that for the same target held constant.
    live = jax.jit(jax.grad(loss(own)))(params, params)["net"]
    held = jax.jit(jax.grad(lambda net: loss(averaged)({**params, "net": net, "target": params["net"]}, params)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), live, held(params["net"]))


def test_joint_teacher_learns_from_its_own_loss_alone(mlp, mlp_params, digits_batch):
    joint_teacher = {"name": "denoising", "parameterization": "edm", "time_sampler": "log_normal", "weighting": "edm"}
    objective = objective_of(solver="ddim", joint_teacher=joint_teacher)
    assert objective.frozen == ()
    init = jax.eval_shape(lambda: objective.init(mlp, jax.random.key(0)))
    assert init.keys() == {"net", "teacher"} and init["teacher"].keys() == {"net"}
    params = {"net": mlp_params["net"], "teacher": mlp_params}
    worse = {**params, "teacher": jax.tree.map(lambda p: 1.5 * p, mlp_params)}
    draws = objective.draw(digits_batch, jax.random.key(0), jnp.int32(0), {})
    batch = {**digits_batch, "draws": draws}

    def total(params, ema):
        return objective.loss(mlp.apply, params, ema, batch, None, jnp.int32(0))[0].mean()

    def alone(teacher):
        own = {**batch, "draws": draws["joint_teacher"]}
        return objective.joint_teacher.loss(mlp.apply, teacher, teacher, own, None, jnp.int32(0))[0].mean()

    grads, of_average = jax.jit(jax.grad(total, argnums=(0, 1)))(params, params)
    expected = jax.jit(jax.grad(alone))(mlp_params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads["teacher"], expected)
    assert optax.global_norm(of_average) == 0
    # The solver follows the teacher's EMA, not the teacher.
    step = jax.jit(total)
    assert step(params, params) != step(params, worse)


def test_target_decay_follows_the_discretization():
    objective = objective_of(discretization={"name": "square_root", "steps": 100, "decay": 0.9}, target="average")
    assert objective.frozen == ("target",)
    params = {"net": {"w": jnp.float32(1)}, "target": {"w": jnp.float32(0)}}
    for step in (0, 50, 100):
        prepared, _ = objective.before_step(params, params, {}, {}, None, jnp.int32(step))
        decay = 0.9 ** (2 / {0: 2, 50: 107, 100: 151}[step])
        np.testing.assert_allclose(prepared["target"]["w"], 1 - decay, rtol=1e-4)
        assert prepared["net"] is params["net"]
    own = objective_of()
    assert own.before_step({"net": 1}, {}, {}, {}, None, 0) == ({"net": 1}, {})


@pytest.mark.parametrize(("step", "points"), [(0, 2), (8, 15), (200_000, 76), (400_000, 107), (800_000, 151),
                                              (900_000, 151)])  # fmt: skip
def test_square_root_discretization(step, points):
    """Song et al. 2023, appendix C, for K = 800,000, s0 = 2 and s1 = 150."""
    metrics = discretization.square_root(800_000, decay=0.9).metrics(jnp.int32(step))
    if step == 8:
        points = int(np.ceil(np.sqrt(8 / 800_000 * (151**2 - 4) + 4) - 1) + 1)
    assert metrics["points"] == points
    np.testing.assert_allclose(metrics["target_decay"], np.exp(2 * np.log(0.9) / points), rtol=1e-6)


@pytest.mark.parametrize(
    ("step", "points"), [(0, 11), (49_999, 11), (50_000, 21), (100_000, 41), (350_000, 1281), (10**6, 1281)]
)
def test_doubling_discretization(step, points):
    """Song & Dhariwal 2023, section 3.4, for K = 400,000, s0 = 10 and s1 = 1280: eight stages of 50,000 steps."""
    assert discretization.doubling(400_000).metrics(jnp.int32(step))["points"] == points


def test_pairs_are_neighbours_on_the_grid(x64):
    objective = objective_of()
    grid = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 18) ** 7
    t = jnp.concatenate([jnp.asarray(grid) / 80 * 0.999, jnp.array([1e-6, 1.0])])
    t, r = discretization.fixed(18).pair(objective.schedule, t, objective.t_min, 0)
    order = [1, *range(1, 18), 1, 17]
    np.testing.assert_allclose(t * 80, grid[order], rtol=1e-6)
    np.testing.assert_allclose(r * 80, grid[np.array(order) - 1], rtol=1e-6)
    assert t.max() == 1 and r.min() == objective.t_min


def test_time_samplers_give_the_papers_probabilities():
    """Uniform over the grid for CT; for iCT the normal probability of log(sigma) between consecutive grid points."""
    schedule, n = build("schedules", EDM), 200_000
    grid = np.linspace(0.002 ** (1 / 7), 80 ** (1 / 7), 12) ** 7
    samplers = {
        "karras": (time_sampling.karras(), np.full(11, 1 / 11)),
        "log_normal": (time_sampling.log_normal(-1.1, 2.0, 0.002, 80.0), np.diff(norm.cdf((np.log(grid) + 1.1) / 2))),
    }
    for sampler, p in samplers.values():
        t, _ = sampler.draw(schedule, jax.random.key(0), n, {})
        t, _ = discretization.fixed(12).pair(schedule, t, 2.5e-5, 0)
        counts = np.bincount(np.searchsorted(grid, np.asarray(t) * 80 * 0.999), minlength=12)[1:]
        p = p / p.sum()
        assert (abs(counts / n - p) < 5 * np.sqrt(p / n)).all()


def test_ratio_discretization(x64):
    """r / t = 1 - n(t) / q^a, n(t) = 1 + k sigmoid(-b t), and a grows by one every `every` steps (Geng et al. 2024)."""
    schedule, ratio = build("schedules", EDM), discretization.ratio(every=100, q=2.0)
    level = np.array([0.01, 0.5, 3.0, 80.0])
    for step in (0, 99, 100, 350, 2000):
        t, r = ratio.pair(schedule, jnp.asarray(level / 80), 0.0, jnp.int32(step))
        expected = np.maximum(1 - (1 + 8 / (1 + np.exp(level))) / 2 ** (1 + step // 100), 0) * level
        np.testing.assert_allclose(r * 80, expected, rtol=1e-6, atol=1e-12)
        assert (r < t).all()
    # It is computed in time where the noise level is infinite at t = 1.
    t, r = ratio.pair(build("schedules", "flow"), jnp.array([0.5, 1.0]), 0.0, jnp.int32(350))
    np.testing.assert_allclose(r / t, 1 - (1 + 8 / (1 + np.exp(np.array([0.5, 1.0])))) / 16, rtol=1e-6)


def test_distances_and_weights_match_a_manual_computation(x64):
    objective = objective_of(huber=0.1)
    square = objective_of(metric="l2", weighting="one")
    batch = batch_of(4)
    batch["draws"] = objective.draw(batch, jax.random.key(0), jnp.int32(0), {})
    net = network_of(objective, lambda x, level: x / (1 + level))
    loss, _ = objective.loss(net, PARAMS, PARAMS, batch, None, 0)
    t, r, eps = (batch["draws"][name] for name in ("t", "r", "eps"))
    high, low = ((batch["x"] + 80 * u[:, None] * eps) / (1 + 80 * u[:, None]) for u in (t, r))
    low = jnp.where((r == objective.t_min)[:, None], batch["x"] + LOWEST * eps, low)
    error = ((high - low) ** 2)[:, 0]
    np.testing.assert_allclose(loss, (np.sqrt(error + 0.01) - 0.1) / (80 * (t - r)), rtol=1e-6)
    np.testing.assert_allclose(square.loss(net, PARAMS, PARAMS, batch, None, 0)[0], error, rtol=1e-6)


def test_distance_and_weight_of_easy_consistency_tuning(x64):
    """The authors' code: the root of the mean square (up to a factor of the number of dimensions) times
    1 / t^2 + 1 / sigma_data^2. Its gradient is finite where the distance is 0."""
    edm = {"name": "edm", "sigma_data": 0.5}
    objective = objective_of(
        parameterization=edm, discretization=RATIO, sigma_min=0.0, weighting="inverse_c_out", huber=0.0
    )
    batch = batch_of(4)
    batch["draws"] = objective.draw(batch, jax.random.key(0), jnp.int32(30), {})

    def loss(factor):
        net = network_of(objective, lambda x, level: factor * x / (1 + level))
        return objective.loss(net, PARAMS, PARAMS, batch, None, 0)[0]

    t, r, eps = (batch["draws"][name] for name in ("t", "r", "eps"))
    high, low = ((batch["x"] + 80 * u[:, None] * eps) / (1 + 80 * u[:, None]) for u in (t, r))
    assert (r > 0).any()
    distance = abs(high - jnp.where((r > 0)[:, None], low, batch["x"]))[:, 0]
    np.testing.assert_allclose(loss(1.0), distance * (1 / (80 * t) ** 2 + 1 / 0.5**2), rtol=1e-5)
    batch["x"], batch["draws"]["eps"] = 0 * batch["x"], 0 * eps
    assert (loss(1.0) == 0).all() and np.isfinite(jax.jacobian(loss)(1.0)).all()


INVALID = [
    ({"parameterization": "x0"}, "objective.parameterization"),
    ({"parameterization": {"name": "edm"}}, "objective.parameterization"),
    ({"solver": "heun"}, "objective.teacher"),
    ({"joint_teacher": {"name": "denoising", "parameterization": "edm"}}, "objective.solver"),
    (
        {"joint_teacher": {"name": "denoising", "schedule": "flow"}, "solver": "heun"},
        "objective.joint_teacher.schedule",
    ),
    ({"joint_teacher": {"name": "denoising"}, "solver": "heun", "teacher": TEACHER}, "objective.joint_teacher"),
    ({"teacher": TEACHER, "schedule": {"name": "edm", "sigma_max": 50.0}}, "objective.teacher"),
    ({"teacher": TEACHER, "solver": "ddim", "guidance": 2.0}, "objective.guidance"),
    ({"discretization": {"name": "fixed", "points": 1}}, "objective.discretization.points"),
    ({"discretization": {"name": "fixed", "rho": 0.0}}, "objective.discretization.rho"),
    ({"discretization": {"name": "square_root", "steps": 0}}, "objective.discretization.steps"),
    ({"discretization": {"name": "doubling", "steps": 9, "end": 5}}, "objective.discretization.end"),
    ({"discretization": {"name": "ratio", "every": 5, "q": 1.0}}, "objective.discretization.q"),
    ({"discretization": {"name": "ratio", "every": 5, "k": -1.0}}, "objective.discretization.k"),
    ({"huber": -0.1}, "objective.huber"),
    ({"sigma_min": -1.0}, "objective.sigma_min"),
    ({"sigma_min": 100.0}, "objective.sigma_min"),
]


def test_a_boundary_below_the_smallest_float32_is_the_data():
    tiny = {**COEFFICIENTS, "sigma_min": 1e-46}
    assert objective_of(sigma_min=1e-46, parameterization=tiny).t_min == 0


@pytest.mark.parametrize(("options", "field"), INVALID, ids=lambda value: str(value)[:60])
def test_invalid_options_are_rejected(options, field):
    with refused(field):
        objective_of(**options)
