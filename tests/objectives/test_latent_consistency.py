"""Latent consistency distillation of an analytic teacher."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import expand
from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Denoised, Network, Spec, class_labels
from diffusion.objectives.base.teacher import Teacher
from diffusion.sampling.guidance import guidance_embedding
from diffusion.sampling.loop import bind
from diffusion.training import ema, optimizer
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from tests.objectives.drawing import with_draws
from tests.refusals import refused
from tests.tiers import slow_except

VP = build("schedules", {"name": "vp", "betas": "scaled_linear"})
DENOISING = build("objectives", {"name": "denoising", "schedule": {"name": "vp", "betas": "scaled_linear"},
                                 "parameterization": {"name": "eps", "c_noise": "index"}})  # fmt: skip
MEANS, STD = np.array([1.0, -2.0]), 0.3  # of the data, per label
WIDE = 1.5  # standard deviation of all data, whose mean is 0


def x0_of(x, t, label, keep):
    """Returns E[x0 | x_t] for x0 ~ N(MEANS[label], STD^2) with the condition, and x0 ~ N(0, WIDE^2) without."""
    alpha, sigma = (np.asarray(c(jnp.asarray(t)))[:, None] for c in (VP.alpha, VP.sigma))
    mean, std = (np.where(keep, MEANS[label], 0)[:, None], np.where(keep, STD, WIDE)[:, None])
    return (sigma**2 * mean + alpha * std**2 * x) / (alpha**2 * std**2 + sigma**2)


def eps_of(params, x, c_noise, cond, *, key=None):
    """Predicts eps from the index of the table; the network of the analytic teacher."""
    t = (c_noise + 1) / 1000
    alpha, sigma = expand(VP.alpha(t), x), expand(VP.sigma(t), x)
    keep = jnp.broadcast_to(cond.get("keep", True), t.shape)
    mean = jnp.where(keep, jnp.asarray(MEANS)[cond["label"]], 0)[:, None]
    std = jnp.where(keep, STD, WIDE)[:, None]
    x0 = (sigma**2 * mean + alpha * std**2 * x) / (alpha**2 * std**2 + sigma**2)
    return (x - alpha * x0) / sigma


ANALYTIC = Teacher(
    Network(lambda key: {}, eps_of), DENOISING, Spec(ArraySpec((2,), "points"), class_labels(2)), cond_drop_rate=0.1
)
COND = {"label": jnp.array([0, 1, 1, 0]), "keep": jnp.array([True, True, False, True])}
T = np.array([0.02, 0.5, 0.3, 1.0])
SCALES = np.array([1.0, 4.0, 6.0, 2.5])


def objective_of(**options):
    spec = {"name": "latent_consistency", "parameterization": {"name": "eps", "c_noise": "index"}}
    return build("objectives", {**spec, "teacher": ANALYTIC, **options})


def ddim_step(x, s):
    """Returns eq. 13 and the DDIM step of arXiv 2310.04378, with omega = scale - 1, from T to s."""
    label, keep = np.asarray(COND["label"]), np.asarray(COND["keep"])
    alpha_t, sigma_t, alpha_s, sigma_s = (
        np.asarray(c(jnp.asarray(u)))[:, None] for u in (T, s) for c in (VP.alpha, VP.sigma)
    )
    kept, dropped = ((x - alpha_t * x0_of(x, T, label, k)) / sigma_t for k in (keep, np.zeros(4, bool)))
    omega = SCALES[:, None] - 1
    noise = (1 + omega) * kept - omega * dropped
    return alpha_s * (x - sigma_t * noise) / alpha_t + sigma_s * noise


# The target.


@pytest.mark.parametrize(("skip", "s"), [(20, [0.0, 0.48, 0.28, 0.98]), (60, [0.0, 0.44, 0.24, 0.94])])
def test_target_follows_the_guided_teacher(x64, skip, s):
    """Compares the loss and the networks' inputs at both ends with a manual computation."""
    objective, seen = objective_of(skip=skip), []

    def net(params, x, c_noise, cond, *, key=None):
        seen.append((params, x, c_noise, cond["guidance_scale"], key))
        return jnp.zeros_like(x)

    x0, eps = jax.random.normal(jax.random.key(0), (2, 4, 2))
    draws = {"t": jnp.asarray(T), "guidance": jnp.asarray(SCALES), "eps": eps, "weight": jnp.ones(4)}
    batch = {"x": x0, "cond": COND, "draws": draws}
    params = {"net": "student", "target": "target", "teacher": {"net": {}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "stop_gradient", lambda x: x)  # so that strings can stand for parameters
        loss, _ = objective.loss(net, params, {}, batch, "key", 0)
    x_t = VP.alpha(T)[:, None] * x0 + VP.sigma(T)[:, None] * eps
    x_s, s = ddim_step(np.asarray(x_t), np.array(s)), np.array(s)
    calls = {name: rest for name, *rest in seen}
    assert set(calls) == {"student", "target"} and len(seen) == 2
    for name, x, t in (("student", x_t, T), ("target", x_s, s)):
        network_input, c_noise, scale, key = calls[name]
        np.testing.assert_allclose(network_input, x, rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(c_noise, 1000 * t - 1, atol=1e-9)
        np.testing.assert_array_equal(scale, SCALES)
        assert key == "key"  # the same dropout for both
    # The network predicts no noise: x0 = x / alpha, with the boundary scalings.
    ends = []
    for x, t in ((np.asarray(x_t), T), (x_s, s)):
        skip_out, out = scalings(t)
        ends.append(skip_out[:, None] * x + out[:, None] * x / np.asarray(VP.alpha(t))[:, None])
    difference = ends[0] - ends[1]
    np.testing.assert_allclose(loss, (np.sqrt(difference**2 + 1e-6) - 1e-3).mean(1), rtol=1e-8)


def scalings(t, scaling=10.0):
    """Returns c_skip and c_out of the paper's code, with sigma_data = 0.5 and t in steps of the table."""
    return 0.25 / ((scaling * 1000 * t) ** 2 + 0.25), scaling * 1000 * t / np.sqrt((scaling * 1000 * t) ** 2 + 0.25)


def test_scale_1_is_the_conditional_teacher_and_0_the_unconditional(x64):
    """They are DDIM steps of a teacher without guidance."""
    objective, ddim = objective_of(), build("samplers", "ddim")
    denoise = ANALYTIC.denoiser({"net": {}})
    x = jax.random.normal(jax.random.key(0), (4, 2))
    t, s = jnp.full(4, 0.5), jnp.full(4, 0.48)
    for scale, keep in ((1.0, COND["keep"]), (0.0, jnp.zeros(4, bool))):
        plain, *_ = ddim.step(
            x, (), bind(denoise, {**COND, "keep": keep}), VP, jnp.float64(0.5), jnp.float64(0.48), None
        )
        found = objective.guided_ddim_step(denoise, x, t, s, COND, jnp.full(4, scale))
        np.testing.assert_allclose(found, plain, atol=1e-12)


def test_loss_is_zero_for_a_consistent_student(x64):
    """For data at a single point a DDIM step is exact, so the exact student is consistent."""
    point = 0.7

    def net(params, x, c_noise, cond, *, key=None):
        t = (c_noise + 1) / 1000
        alpha, sigma = expand(VP.alpha(t), x), expand(VP.sigma(t), x)
        return jnp.where(sigma > 0, (x - alpha * point) / jnp.where(sigma > 0, sigma, 1), 0)

    teacher = dataclasses.replace(ANALYTIC, network=Network(lambda key: {}, net))
    objective = objective_of(teacher=teacher, metric="l2")
    key = jax.random.key(0)
    batch = with_draws(objective, {"x": jnp.full((64, 2), point), "cond": {}}, key)
    params = {"net": {}, "target": {}, "teacher": {"net": {}}}
    loss, _ = objective.loss(net, params, {}, batch, key, 0)
    np.testing.assert_allclose(loss, 0, atol=1e-8)  # c_out is slightly below 1


@pytest.mark.slow
@pytest.mark.parametrize("metric", slow_except(("pseudo_huber",), ("l2", "pseudo_huber")))
def test_metric(metric):
    objective = objective_of(metric=metric, huber=0.03)

    def net(params, x, c_noise, cond, *, key=None):
        return jnp.broadcast_to(params, x.shape)

    t = jnp.array([0.5])
    draws = {"t": t, "guidance": jnp.ones(1), "eps": jnp.ones((1, 2)), "weight": jnp.full(1, 3.0)}
    batch = {"x": jnp.ones((1, 2)), "cond": {"label": jnp.array([1])}, "draws": draws}
    params = {"net": jnp.array([0.3, 0.5]), "target": jnp.array([0.4, 0.2]), "teacher": {"net": {}}}
    x_t = VP.alpha(t) + VP.sigma(t) * jnp.ones((1, 2))
    s = t - 0.02
    x_s = objective.guided_ddim_step(ANALYTIC.denoiser(params["teacher"]), x_t, t, s, batch["cond"], draws["guidance"])
    cond = {**batch["cond"], "guidance_scale": draws["guidance"]}
    f = objective.consistency_function
    d = np.asarray(f(net, params["net"], x_t, t, cond) - f(net, params["target"], x_s, s, cond))
    expected = (d**2).mean() if metric == "l2" else (np.sqrt(d**2 + 0.03**2) - 0.03).mean()
    loss, _ = objective.loss(net, params, {}, batch, None, 0)
    np.testing.assert_allclose(loss, 3 * expected, rtol=1e-4)


def test_draws_of_times_and_scales():
    """t is on the grid of 50 points, and so is s, down to 0. The scales cover their range independently of t."""
    objective = objective_of(guidance=(2.0, 5.0))
    draws = objective.draw({"x": jnp.zeros((4000, 1))}, jax.random.key(0), 0, {})
    steps = np.asarray(draws["t"]) * 50
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    assert set(np.round(steps).astype(int)) == set(range(1, 51))
    assert (jnp.maximum(draws["t"] - 0.02, 0)[draws["t"] < 0.03] == 0).all()
    scale = np.asarray(draws["guidance"])
    assert scale.min() >= 2 and scale.max() <= 5
    np.testing.assert_allclose([scale.mean(), scale.std()], [3.5, 3 / 12**0.5], atol=0.05)
    assert abs(np.corrcoef(steps, scale)[0, 1]) < 0.06


# The networks.


@pytest.fixture(scope="module")
def trained():
    """Returns a teacher, a student's network conditioned on the scale, and the teacher's parameters."""
    spec = {"name": "mlp", "width": 8, "depth": 1}
    plain, conditioned = (
        build("networks", {**spec, "scalar_conditions": names}, shape=(2,), num_classes=2)
        for names in ((), ("guidance_scale",))
    )
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) / 4,
                          jax.jit(plain.init)(jax.random.key(0)))  # fmt: skip
    return dataclasses.replace(ANALYTIC, network=plain), conditioned, {"net": params}


BATCH = {"x": np.random.default_rng(1).normal(size=(8, 2)).astype(np.float32), "cond": {"label": jnp.arange(8) % 2}}


def test_only_the_student_receives_a_gradient(trained):
    teacher, network, theirs = trained
    objective = objective_of(teacher=teacher)
    params = objective.init(network, jax.random.key(1), theirs)
    key = jax.random.key(2)
    batch = with_draws(objective, BATCH, key)

    def total(params):
        return objective.loss(network.apply, params, {}, batch, key, 0)[0].sum()

    gradient = jax.jit(jax.grad(total))(params)
    for name in ("target", "teacher"):
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient[name])), name
    assert max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(gradient["net"])) > 1e-3


@pytest.mark.slow
def test_target_follows_the_student_through_training(trained):
    """Student and target start from the teacher. Each step updates the target with the student of the previous step.
    The train step's state is donated."""
    teacher, network, theirs = trained
    objective = objective_of(teacher=teacher, target_decay=0.7)
    opt, averages = optimizer.make_optimizer(steps=9, name="sgd", learning_rate=0.1), ema.make_ema(decays=(0.5,))
    given = jax.tree.map(jnp.array, theirs)
    state = init_state(objective, network, opt, averages, jax.random.key(0), given)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state.params)]
    assert len(set(places)) == len(places)  # no buffer is donated twice
    paths = jax.tree.leaves_with_path(theirs["net"])
    for name in ("net", "target"):
        for path, leaf in paths:
            np.testing.assert_array_equal(at(state.params[name], path), leaf)
    step = jax.jit(make_step(objective, network, opt, averages, seed=0, cond_drop_rate=0.2), donate_argnums=0)
    students, expected = [jax.device_get(state.params["net"])], jax.device_get(state.params["target"])
    for _ in range(3):
        state, _ = step(state, BATCH)
        expected = jax.tree.map(lambda old, new: 0.7 * old + 0.3 * new, expected, students[-1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
                     jax.device_get(state.params["target"]), expected)  # fmt: skip
        students.append(jax.device_get(state.params["net"]))
    moved = jax.tree.map(lambda a, b: abs(a - b).max(), students[0], expected)
    assert max(jax.tree.leaves(moved)) > 1e-3
    assert set(state.ema["0.5"]) == {"net"}
    for path, leaf in paths:
        np.testing.assert_array_equal(at(state.params["teacher"]["net"], path), leaf)


def at(tree, path):
    for part in path:
        tree = tree[part.key]
    return tree


# The model.


@pytest.mark.parametrize("parameterization", [{"name": "eps", "c_noise": "index"}, {"name": "edm"}], ids=str)
def test_boundary_is_exact(parameterization, trained):
    """f(x, 0) = x bit for bit in float32, also where the noise label is infinite."""
    teacher, network, theirs = trained
    ddpm = build("objectives", {"name": "denoising", "schedule": {"name": "vp", "betas": "scaled_linear"},
                                "parameterization": parameterization})  # fmt: skip
    objective = objective_of(parameterization=parameterization, teacher=dataclasses.replace(teacher, objective=ddpm))
    params = objective.init(network, jax.random.key(1), theirs)
    x = jax.random.normal(jax.random.key(0), (256, 2)) * jnp.logspace(-6, 4, 256)[:, None]
    denoise, cond = objective.denoiser(network.apply, params), {"label": jnp.zeros(256, jnp.int32)}
    denoised = jax.jit(denoise)(x, jnp.float32(0), cond)
    assert denoised.kind == "consistency"
    np.testing.assert_array_equal(np.asarray(denoised.x0).view(np.uint32), np.asarray(x).view(np.uint32))


def test_scalings_match_the_paper(x64):
    t = np.array([1e-6, 1e-5, 1e-4, 0.02, 1.0])
    x = jax.random.normal(jax.random.key(0), (5, 2))
    x0 = np.asarray(Denoised(x / VP.alpha(t)[:, None]).x0)  # of a network that predicts no noise
    for scaling in (10.0, 3.0):
        found = objective_of(timestep_scaling=scaling).consistency_function(
            lambda p, x, *_, key: jnp.zeros_like(x), {}, x, t, {}
        )
        c_skip, c_out = (c[:, None] for c in scalings(t, scaling))
        np.testing.assert_allclose(found, c_skip * x + c_out * x0, rtol=1e-12)


def test_denoiser_is_conditioned_on_the_scale_1_by_default():
    def net(params, x, c_noise, cond, *, key=None):
        return x * cond["guidance_scale"][:, None]

    denoise, x = objective_of().denoiser(net, {"net": {}}), jnp.ones((3, 2))
    plain, one, three = (
        d(x, 0.5, {}).x0
        for d in (denoise, guidance_embedding(denoise, 1.0), guidance_embedding(denoise, jnp.float32(3.0)))
    )
    np.testing.assert_array_equal(plain, one)
    alpha, sigma = float(VP.alpha(0.5)), float(VP.sigma(0.5))
    np.testing.assert_allclose(three, (1 - 3 * sigma) / alpha, rtol=1e-4)
    np.testing.assert_allclose(plain, (1 - sigma) / alpha, rtol=1e-4)


def teacher_of(**spec):
    spec = {"schedule": {"name": "vp", "betas": "scaled_linear"}, "parameterization": {"name": "eps"}, **spec}
    return dataclasses.replace(ANALYTIC, objective=build("objectives", {"name": "denoising", **spec}))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"teacher": None}, "objectives.teacher"),
        ({"teacher": dataclasses.replace(ANALYTIC, cond_drop_rate=0.0)}, "objectives.teacher"),
        ({"teacher": teacher_of(schedule="vp")}, "objectives.teacher"),
        ({"teacher": teacher_of()}, "objectives.teacher"),
        ({"teacher": teacher_of(parameterization="v")}, "objectives.teacher"),
        ({"schedule": "flow", "parameterization": "v"}, "objectives.schedule.name"),
        ({"skip": 0}, "objectives.skip"),
        ({"skip": 30}, "objectives.skip"),
        ({"skip": 1020}, "objectives.skip"),
        ({"ddim_steps": 0}, "objectives.ddim_steps"),
        ({"guidance": (4.0, 2.0)}, "objectives.guidance"),
        ({"guidance": (-1.0, 2.0)}, "objectives.guidance"),
        ({"target_decay": 1.0}, "objectives.target_decay"),
        ({"timestep_scaling": 0.0}, "objectives.timestep_scaling"),
        ({"huber": 0.0}, "objectives.huber"),
        ({"metric": "lpips"}, "objectives.metric"),
    ],
)
def test_invalid_options_are_rejected(options, field):
    with refused(field):
        objective_of(**options)


def test_network_without_a_guidance_scale_is_rejected(trained):
    teacher, _, theirs = trained
    with refused("network.scalar_conditions"):
        objective_of(teacher=teacher).init(teacher.network, jax.random.key(0), theirs)
