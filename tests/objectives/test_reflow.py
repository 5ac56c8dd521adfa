"""Reflow on the pairs of analytic teachers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Network, Spec, class_labels
from diffusion.distributed import sharding
from diffusion.objectives.base.teacher import Teacher
from diffusion.process.analytic import Mixture
from diffusion.sampling import grids
from diffusion.sampling.loop import bind, sample
from diffusion.training import ema, optimizer
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from tests.process.gaussian_ode import gaussian_ode_map
from tests.refusals import refused
from tests.tiers import slow_except

FLOW = build("objectives", "flow_matching")
GAUSSIAN = Mixture(means=[[0.5, -0.5]], stds=[0.5], weights=[1.0])
PARAMS = {"net": {"shift": jnp.zeros(2)}, "teacher": {"net": {"shift": jnp.zeros(2)}}}


def exact_network(data, init=None, correction=None):
    """Returns a network whose velocity is that of `data` plus a trainable correction."""

    def net(params, x, c_noise, cond, *, key=None):
        t = c_noise / 1000
        coeffs, alpha, sigma = FLOW.parameterization(FLOW.schedule, t), FLOW.schedule.alpha(t), FLOW.schedule.sigma(t)
        exact = coeffs.from_x0(data.denoise(x, alpha, sigma), x, alpha, sigma)
        return exact + (correction(params, x, c_noise, cond) if correction else params["shift"])

    return Network(init or (lambda key: {"shift": jnp.zeros(2)}), net)


def predict_label(params, x, c_noise, cond, *, key=None):
    """Predicts the velocity whose x0 is the label in both coordinates, or -1 if the label is dropped."""
    label = jnp.where(cond.get("keep", jnp.array(True)), cond["label"], -1)[:, None] + params["shift"]
    return (x - label) / (c_noise / 1000)[:, None]


LABELLED = Teacher(
    Network(lambda key: {"shift": jnp.zeros(2)}, predict_label),
    FLOW,
    Spec(ArraySpec((2,), "points"), class_labels(6)),
    0.1,
)


def objective_of(teacher=LABELLED, **options):
    spec = {"name": "reflow", "round_steps": 10, "pool": 12, "every": 2, "ode_steps": 3, "teacher": teacher}
    return build("objectives", {**spec, **options}, field="objective")


def batch_of(n=4, label=3):
    cond = {"label": jnp.full(n, label), "keep": jnp.arange(n) % 2 == 0}
    return {"x": jnp.full((n, 2), 9.0), "cond": cond}


def test_pairs_are_ends_of_the_teachers_paths(x64):
    """They equal DDIM samples to the last digit, and solutions of the ODE up to an error of first order."""
    errors = []
    for steps in (40, 80):
        objective = objective_of(
            Teacher(exact_network(GAUSSIAN), FLOW, Spec(ArraySpec((2,), "points"))), ode_steps=steps
        )
        batch = {"x": jnp.zeros((64, 2)), "cond": {}}
        pairs = objective.generate_pairs(PARAMS["teacher"], batch, jax.random.key(0), jnp.int32(0))
        times = jnp.asarray(grids.trailing(FLOW.schedule, steps))
        denoise, sampler = bind(GAUSSIAN.denoiser(FLOW.schedule), {}), build("samplers", "ddim")
        drawn = sample(denoise, FLOW.schedule, sampler, pairs["eps"], times, jax.random.key(0))
        np.testing.assert_allclose(pairs["x0"], drawn, rtol=1e-11, atol=1e-12)
        ends = gaussian_ode_map(pairs["eps"], GAUSSIAN.means[0], 0.5, 0.0, 1.0, 1.0, 0.0)
        errors.append(jnp.max(jnp.abs(pairs["x0"] - ends)))
    assert 1.9 < errors[0] / errors[1] < 2.1 and errors[1] < 0.03
    assert 0.9 < jnp.std(pairs["eps"]) < 1.1


COMPILED = {}  # by id, with the objective, whose id is not used again while it is alive


def before_step(objective, step, objective_state, params=PARAMS, average=None, label=3):
    batch, key = batch_of(label=label), jax.random.key(step)
    _, compiled = COMPILED.setdefault(id(objective), (objective, jax.jit(objective.before_step)))
    return compiled(params, average or params, batch, objective_state, key, jnp.int32(step))


def test_new_pairs_replace_the_oldest():
    """A batch of pairs is added every second step, and the pool holds three. Labels stay with their pairs."""
    objective = objective_of(round_steps=100)
    objective_state, written = objective.initial_state({}), []
    shapes = jax.tree.map(jnp.shape, objective_state)
    for step in range(10):
        _, objective_state = before_step(objective, step, objective_state, label=step % 6)
        if step % 2 == 0:
            written.append(
                (step, objective.generate_pairs(PARAMS["teacher"], batch_of(label=step % 6), jax.random.key(step), 0))
            )
        assert objective_state["blocks"] == len(written)
        for index, (age, pairs) in list(enumerate(written))[-3:]:
            slot = slice(4 * (index % 3), 4 * (index % 3) + 4)
            np.testing.assert_allclose(objective_state["pairs"]["eps"][slot], pairs["eps"], rtol=1e-6)
            np.testing.assert_allclose(objective_state["pairs"]["x0"][slot], age % 6, atol=1e-5)
            assert (objective_state["pairs"]["label"][slot] == age % 6).all()
    assert jax.tree.map(jnp.shape, objective_state) == shapes and len(written) == 5


def test_all_pairs_of_this_round_and_no_others_are_drawn():
    objective = objective_of(rounds=2)
    objective_state = objective.initial_state({})
    draw = jax.jit(jax.vmap(objective.draw, (None, 0, None, None)))
    keys = jax.random.split(jax.random.key(0), 40)
    for step, blocks in {0: 1, 1: 1, 2: 2, 3: 2, 4: 3, 5: 3, 6: 4, 9: 5, 10: 1, 11: 1, 12: 2, 30: 11}.items():
        before = 7 if step == 10 else blocks - (step % 2 == 0)  # 7 in the previous round
        objective_state["blocks"] = jnp.int32(before)
        _, objective_state = before_step(objective, step, objective_state, label=step % 5)
        assert objective_state["blocks"] == blocks, step
        drawn = draw(batch_of(), keys, jnp.int32(step), objective_state)
        np.testing.assert_allclose(drawn["x0"][..., 0], drawn["label"], atol=1e-5)
        available = objective_state["pairs"]["eps"][: 4 * min(blocks, 3), 0]
        assert set(drawn["eps"][..., 0].ravel().tolist()) == set(available.tolist())


def test_loss_is_flow_matching_on_the_pairs_and_their_labels():
    objective = objective_of()
    _, objective_state = before_step(objective, 0, objective.initial_state({}), label=5)
    batch = batch_of(label=2)
    draws = objective.draw(batch, jax.random.key(1), jnp.int32(0), objective_state)
    np.testing.assert_allclose(draws["x0"], 5, atol=1e-5)

    def student(params, x, c_noise, cond, *, key=None):
        assert (cond["label"] == 5).all() and (cond["keep"] == batch["cond"]["keep"]).all()
        t = draws["t"][:, None]
        np.testing.assert_allclose(x, (1 - t) * draws["x0"] + t * draws["eps"], rtol=1e-5)
        return draws["eps"] - draws["x0"] + 0.5

    loss, _ = objective.loss(student, PARAMS, {}, {**batch, "draws": draws}, None, jnp.int32(0))
    np.testing.assert_allclose(loss, 0.25, rtol=1e-4)
    assert len({float(t) for t in draws["t"]}) == 4


def test_average_is_the_teacher_of_the_next_round():
    """The student keeps its weights, and the pairs of the new round come from the new teacher."""
    objective = objective_of(rounds=2, distill=True)
    params = {"net": {"shift": jnp.full(2, 0.1)}, "teacher": {"net": {"shift": jnp.full(2, 0.2)}}}
    average = {"net": {"shift": jnp.full(2, 0.3)}}
    for step in (0, 1, 2, 9, 10, 12, 19, 20, 22, 30, 40):
        prepared, objective_state = before_step(objective, step, objective.initial_state({}), params, average)
        shift = 0.3 if step in (10, 20) else 0.2
        assert (prepared["net"]["shift"] == jnp.float32(0.1)).all()
        np.testing.assert_allclose(prepared["teacher"]["net"]["shift"], shift, rtol=1e-6)
        if step % 2 == 0:
            np.testing.assert_allclose(objective_state["pairs"]["x0"][:4], 3 + shift, rtol=1e-5)


@pytest.mark.parametrize("rounds", slow_except((1,), (0, 1, 2)))
def test_distillation_trains_at_pure_noise_alone(rounds):
    objective = objective_of(rounds=rounds, distill=True, time_sampler="importance")
    for step in (0, 9, 10, 19, 20, 25, 50):
        _, objective_state = before_step(objective, step - step % 2, objective.initial_state({}))
        objective_state["time_sampler"] = {
            "losses": jnp.tile(jnp.arange(100.0)[:, None], 10),
            "counts": jnp.full(100, 10),
        }
        draws = objective.draw(batch_of(), jax.random.key(0), jnp.int32(step), objective_state)
        for name in ("t", "weight"):
            assert bool((draws[name] == 1).all()) == (step >= 10 * rounds)
        after, _ = objective.update_state(objective_state, draws, jnp.ones(4))
        assert after["time_sampler"]["counts"].sum() == 1004 and after["pairs"] is objective_state["pairs"]


def test_guidance_applies_to_the_first_teacher():
    """-1 without a label and 3 with it give 7 at scale 2. Later teachers have learned this and are not guided."""
    objective = objective_of(rounds=2, guidance=2.0)
    for step, x0 in ((0, 7), (8, 7), (10, 3), (20, 3)):
        pairs = objective.generate_pairs(PARAMS["teacher"], batch_of(), jax.random.key(0), jnp.int32(step))
        np.testing.assert_allclose(pairs["x0"], x0, rtol=1e-5)
        assert (pairs["label"] == 3).all()


@pytest.mark.slow
def test_round_straightens_the_paths():
    """The exact flow of eight modes on a ring is curved near the data; the student learns a correction to it."""
    data = build("data", {"name": "toy", "kind": "mixture", "labels": False, "size": 10})
    mlp = build("networks", {"name": "mlp", "width": 32, "depth": 2}, shape=(2,))
    network = exact_network(data.distribution, mlp.init, mlp.apply)
    objective = objective_of(Teacher(network, FLOW, data.spec), round_steps=300, pool=2048, every=3, ode_steps=30)
    opt = optimizer.make_optimizer(steps=300, learning_rate=3e-3, schedule="cosine")
    averages = ema.make_ema(decays=(0.9,))
    state = init_state(objective, network, opt, averages, jax.random.key(0))
    metric = build("evaluation", {"name": "straightness", "num": 500, "steps": 50}, train=data, held_out=data)

    def model(params):
        return objective.denoiser(network.apply, params), FLOW.schedule

    def curvature_of(params):
        return metric(model, params, jax.random.key(1))["path_curvature"]

    before = curvature_of(state.params)
    step = make_step(objective, network, opt, averages, seed=0)
    batch = {"x": jnp.zeros((128, 2)), "cond": {}}
    after, _ = jax.jit(lambda state: jax.lax.scan(lambda state, _: step(state, batch), state, None, 300))(state)
    assert curvature_of(after.ema["0.9"]) < 0.3 * before


def parts():
    """Returns the parts of a short run of two rounds and a distillation."""
    network = build("networks", {"name": "mlp", "width": 8, "depth": 1}, shape=(2,), num_classes=6)
    teacher = Teacher(network, FLOW, Spec(ArraySpec((2,), "points"), class_labels(6)), 0.1)
    objective = objective_of(teacher, rounds=2, distill=True, round_steps=2, every=1, pool=16)
    opt = optimizer.make_optimizer(steps=6, cycles=3, learning_rate=0.1)
    return objective, network, opt, ema.make_ema(decays=(0.5,))


def initial_train_state():
    objective, network, opt, averages = parts()
    return init_state(objective, network, opt, averages, jax.random.key(0))


def batches(n):
    for i in range(n):
        x = jax.random.normal(jax.random.key(i), (8, 2))
        yield {"x": np.asarray(x), "cond": {"label": (np.arange(8, dtype=np.int32) + i) % 6}}


def run(step, state, batches):
    for batch in batches:
        state, metrics = step(state, batch)
        assert np.isfinite(metrics["loss"])
    return state


@pytest.mark.slow
def test_mesh_and_micro_batches_do_not_change_the_run(mesh_of):
    whole = run(jax.jit(make_step(*parts(), seed=0, cond_drop_rate=0.2)), initial_train_state(), batches(4))
    mesh = mesh_of(2, 2, 1)
    state = initial_train_state()
    places = sharding.of_state(state, mesh, fsdp_min_size=0)
    assert "fsdp" in places.objective_state["pairs"]["x0"].spec
    step = jax.jit(make_step(*parts(), seed=0, cond_drop_rate=0.2, accumulate=2), out_shardings=(places, None))
    split = (sharding.to_global(batch, sharding.by_example(mesh)) for batch in batches(4))
    divided = run(step, jax.device_put(state, places), split)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), whole, divided)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"rounds": 0}, "objective.rounds"),
        ({"rounds": -1, "distill": True}, "objective.rounds"),
        ({"round_steps": 0}, "objective.round_steps"),
        ({"every": 0}, "objective.every"),
        ({"pool": 0}, "objective.pool"),
        ({"ode_steps": 0}, "objective.ode_steps"),
        ({"teacher": None}, "objective.teacher"),
        ({"schedule": "trig"}, "objective.teacher"),
        ({"parameterization": "v"}, "objective.teacher"),
        (
            {"teacher": Teacher(exact_network(GAUSSIAN), FLOW, Spec(ArraySpec((2,), "points")), 0.1), "guidance": 2.0},
            "objective.guidance",
        ),
        ({"teacher": dataclasses.replace(LABELLED, cond_drop_rate=0.0), "guidance": 2.0}, "objective.guidance"),
    ],
)
def test_invalid_options_are_rejected(options, field):
    with refused(field):
        objective_of(**options)


def test_pool_must_be_a_multiple_of_the_batch_size():
    objective = objective_of(pool=10)
    with refused("objective.pool"):
        before_step(objective, 0, objective.initial_state({}))
