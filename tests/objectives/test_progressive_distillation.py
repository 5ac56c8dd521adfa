"""Progressive distillation of an exact teacher, compared with an independent computation of its DDIM steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Denoised, Network, Spec
from diffusion.objectives.base.teacher import Teacher
from diffusion.process.analytic import Mixture
from diffusion.sampling.ode.first_order import first_order
from tests.refusals import refused
from tests.tiers import slow_except

DATA = Mixture(means=[[0.6, -0.2], [-0.5, 0.3]], stds=[0.3, 0.2], weights=[0.4, 0.6])
COSINE = {"name": "vp", "betas": "cosine"}
ZERO_SNR = {"name": "vp", "betas": "linear", "zero_terminal_snr": True}
PATHS = [(COSINE, "v"), (ZERO_SNR, "v"), ("flow", "velocity"), ({"name": "edm"}, {"name": "edm", "c_noise": "time"})]
DEFAULT = PATHS[1:2]  # the linear schedule of zero SNR at t = 1


def exact(schedule, parameterization):
    """Returns a teacher with the exact denoiser of the data; the parameter `shift` is added to its output."""
    objective = build("objectives", {"name": "denoising", "schedule": schedule, "parameterization": parameterization})

    def net(params, scaled, c_noise, cond, *, key=None):
        t = c_noise / 1000
        coeffs, alpha, sigma = objective.parameterization(objective.schedule, t), *at(objective.schedule, t)
        x_t = scaled / coeffs.c_in[:, None]
        return coeffs.from_x0(DATA.denoise(x_t, alpha, sigma), x_t, alpha, sigma) + params["shift"]

    return Teacher(Network(lambda key: {"shift": jnp.zeros(2)}, net), objective, Spec(ArraySpec((2,), "points")))


def at(schedule, t):
    return schedule.alpha(t), schedule.sigma(t)


def objective_of(schedule=COSINE, parameterization="v", *, teacher=None, **options):
    spec = {"name": "progressive_distillation", "start_steps": 4, "round_steps": 10, **options}
    teacher = teacher or exact(schedule, parameterization)
    spec |= {"schedule": schedule, "parameterization": parameterization, "teacher": teacher}
    return build("objectives", spec, field="objective")


def ddim(schedule, x, x0, t, s):
    """Returns x_s by eq. 12 of Song, Meng & Ermon 2021, in its original form."""
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (
        (np.asarray(coefficient)[:, None] for coefficient in at(schedule, time)) for time in (t, s)
    )
    return alpha_s * x0 + sigma_s * (x - alpha_t * x0) / sigma_t


def two_steps(schedule, x, t, steps):
    """Returns the point to which two half steps of the exact teacher lead, and its time."""
    middle, s = np.maximum(t - 0.5 / steps, 0), np.maximum(t - 1 / steps, 0)
    x_m = ddim(schedule, x, DATA.denoise(x, *at(schedule, t)), t, middle)
    safe = np.where(middle > 0, middle, 1)  # at 0 the second step is not used
    x_s = ddim(schedule, x_m, DATA.denoise(x_m, *at(schedule, safe)), safe, s)
    return np.where((middle > 0)[:, None], x_s, x_m), s


@pytest.mark.parametrize(("schedule", "parameterization"), slow_except(DEFAULT, PATHS))
def test_target_leads_to_the_point_of_two_teacher_steps(x64, schedule, parameterization):
    """At t = 1 for every SNR, in between, in the last step to the data and, for continuous times, within it."""
    objective = objective_of(schedule, parameterization, continuous=True)
    t = np.array([1.0, 0.75, 0.6, 0.25, 0.13, 0.125, 0.1, 1e-3])
    x = np.random.default_rng(0).normal(size=(8, 2)) * np.asarray(objective.schedule.sigma(t))[:, None]
    x0 = objective.target({"teacher": {"net": {"shift": 0.0}}}, x, t, {}, jnp.int32(0))
    expected, s = two_steps(objective.schedule, x, t, 4)
    np.testing.assert_allclose(ddim(objective.schedule, x, x0, t, s), expected, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(x0[3:], expected[3:], rtol=1e-12, atol=1e-13)  # these steps arrive at the data


@pytest.mark.parametrize(("schedule", "parameterization"), slow_except(DEFAULT, PATHS))
def test_loss_is_zero_for_a_student_that_does_two_steps_in_one(x64, schedule, parameterization):
    """Otherwise it is the error of the output, with weight max(SNR, 1) on the error of x0."""
    objective = objective_of(schedule, parameterization)
    path = objective.schedule
    step = jnp.int32(10)  # the second round, of two steps

    def student(params, scaled, c_noise, cond, *, key=None):
        t = c_noise / 1000
        coeffs, alpha, sigma = objective.parameterization(path, t), *at(path, t)
        x = scaled / coeffs.c_in[:, None]
        x_s, s = two_steps(path, x, np.asarray(t), 2)
        share = (path.sigma(s) / sigma)[:, None]
        x0 = (x_s - share * x) / (path.alpha(s)[:, None] - share * alpha[:, None])
        return coeffs.from_x0(x0, x, alpha, sigma) + params["shift"]

    def params(shift):
        return {"net": {"shift": shift}, "teacher": {"net": {"shift": 0.0}}}

    batch = {"x": DATA.sample(jax.random.key(0), 8), "cond": {}}
    batch["draws"] = objective.draw(batch, jax.random.key(1), step, {})
    loss, metrics = objective.loss(student, params(0.0), {}, batch, None, step)
    assert jnp.max(loss) < 1e-20 and metrics["student_steps"] == 2
    t = batch["draws"]["t"]
    off, _ = objective.loss(student, params(0.5), {}, batch, None, step)
    weight = jnp.maximum(jnp.exp(path.log_snr(t)), 1) * objective.parameterization(path, t).c_out ** 2
    np.testing.assert_allclose(off, 0.25 * weight, rtol=1e-9)

    x = path.sigma(jnp.ones(8))[:, None] * jax.random.normal(jax.random.key(2), (8, 2))
    denoised = objective.denoiser(student, params(0.0))(x, jnp.float64(1), {})
    landed = first_order(path, x, denoised, jnp.float64(1), jnp.float64(0.5))
    np.testing.assert_allclose(landed, two_steps(path, x, np.ones(8), 2)[0], rtol=1e-11, atol=1e-12)


def test_rounds_follow_from_the_step():
    objective = objective_of(start_steps=12, end_steps=3)
    listed = {0: 12, 1: 12, 9: 12, 10: 6, 19: 6, 20: 3, 29: 3, 30: 3, 10_000: 3}
    assert {step: int(jax.jit(objective.student_steps)(step)) for step in listed} == listed
    assert objective.rounds == 3


def test_times_are_those_of_the_round():
    """All i / N are equally frequent; continuous times are even on (0, 1] in every round."""
    batch = {"x": jnp.zeros((24, 2)), "cond": {}}
    for step, steps in ((0, 12), (10, 6), (25, 3)):
        t = objective_of(start_steps=12, end_steps=3).draw(batch, jax.random.key(step), jnp.int32(step), {})["t"]
        values, counts = np.unique(np.asarray(t), return_counts=True)
        np.testing.assert_allclose(values, np.arange(1, steps + 1) / steps, rtol=1e-6)
        assert (counts == 24 // steps).all() and t.max() == 1
        continuous = objective_of(start_steps=12, end_steps=3, continuous=True)
        t = continuous.draw(batch, jax.random.key(step), jnp.int32(step), {})["t"]
        np.testing.assert_allclose(np.diff(np.sort(t)), 1 / 24, rtol=1e-4)
        assert t.min() > 0 and t.max() <= 1


def test_average_becomes_teacher_and_student_only_when_a_round_begins():
    objective = objective_of()  # rounds begin at 0, 10, 20
    before_step = jax.jit(lambda step: objective.before_step(params, average, {}, {}, jax.random.key(0), step)[0])
    params = {"net": {"shift": 1.0}, "teacher": {"net": {"shift": 2.0}, "other": 4.0}}
    average = {"net": {"shift": 3.0}}
    for step in (0, 1, 9, 10, 11, 19, 20, 21, 29, 30, 31, 40, 100):
        prepared = before_step(step)
        found = [float(prepared["net"]["shift"]), float(prepared["teacher"]["net"]["shift"])]
        assert found == ([3, 3] if step in (10, 20) else [1, 2]), step
        assert prepared["teacher"]["other"] == 4


def test_student_starts_from_its_teacher():
    objective, given = objective_of(), {"net": {"shift": jnp.array([1.0, 2.0])}}
    params = objective.init(objective.teacher.network, jax.random.key(0), given)
    assert (params["net"]["shift"] == given["net"]["shift"]).all() and params["teacher"].keys() == {"net"}
    assert params["net"]["shift"] is not params["teacher"]["net"]["shift"]
    extra = {"shift": jnp.zeros(2), "step_size": jnp.zeros(2)}
    conditioned = Network(lambda key: extra, None, scalar_conditions=("step_size",))
    with refused("network.scalar_conditions"):
        objective.init(conditioned, jax.random.key(0), given)


@pytest.mark.slow
@pytest.mark.parametrize(("schedule", "parameterization"), slow_except(DEFAULT, PATHS[:3]))
def test_gradients_are_finite_and_zero_for_the_teacher(schedule, parameterization):
    objective = objective_of(schedule, parameterization, continuous=True)
    t = jnp.array([1.0, 1 - 1e-6, 0.5, 0.25, 0.125, 1e-3, 2e-7])
    eps = jax.random.normal(jax.random.key(0), (7, 2))
    batch = {"x": DATA.sample(jax.random.key(1), 7), "cond": {}}
    batch["draws"] = {"t": t, "weight": jnp.ones(7), "eps": eps}

    def loss(params, step):
        return objective.loss(objective.teacher.network.apply, params, {}, batch, None, step)[0]

    params = {"net": {"shift": jnp.full(2, 0.1)}, "teacher": {"net": {"shift": jnp.zeros(2)}}}
    compiled = jax.jit(lambda params, step: (loss(params, step), jax.jacobian(loss)(params, step)))
    for step in (0, 10, 20):
        value, jacobian = compiled(params, step)
        assert np.isfinite(value).all() and np.isfinite(jacobian["net"]["shift"]).all()
        assert (jacobian["net"]["shift"] != 0).any(axis=1).all()
        assert (jacobian["teacher"]["net"]["shift"] == 0).all()


class FewStep:
    """An objective whose model is a consistency model, which cannot be a teacher."""

    frozen, schedule = (), build("schedules", COSINE)

    def init(self, network, key, teacher=None):
        return {}

    def denoiser(self, net, params):
        return lambda x, t, cond: Denoised(x, kind="consistency")


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"start_steps": 6}, "objective.start_steps"),
        ({"start_steps": 2, "end_steps": 4}, "objective.start_steps"),
        ({"start_steps": 0}, "objective.start_steps"),
        ({"end_steps": 0}, "objective.end_steps"),
        ({"round_steps": 0}, "objective.round_steps"),
        ({"teacher": exact("flow", "v")}, "objective.teacher"),
        ({"teacher": exact(COSINE, "x0")}, "objective.teacher"),
        ({"teacher": exact(COSINE, {"name": "v", "c_noise": "index"})}, "objective.teacher"),
        ({"teacher": Teacher(Network(None, None), FewStep(), Spec(ArraySpec((2,), "points")))}, "objective.teacher"),
    ],
)
def test_invalid_options_are_rejected(options, field):
    with refused(field):
        objective_of(**options)


def test_teacher_is_required():
    spec = {"name": "progressive_distillation", "start_steps": 4, "round_steps": 10}
    with refused("objective.teacher"):
        build("objectives", spec, field="objective")
