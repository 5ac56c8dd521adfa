"""Flow matching and its couplings."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from diffusion.core.build import build
from diffusion.objectives.flow_matching import random_others, sinkhorn, squared_distances
from tests.objectives.drawing import with_draws
from tests.refusals import refused


@pytest.fixture
def batch():
    return {"x": jax.random.normal(jax.random.key(0), (6, 2)), "cond": {}}


def eps_of(batch, coupling):
    objective = build("objectives", {"name": "flow_matching", "coupling": coupling})
    return jax.jit(objective.draw)(batch, jax.random.key(1), 0, {})["eps"]


def test_exact_coupling_is_the_best_permutation(batch):
    """It has the least squared distance of all 720 permutations of the same noise."""
    plain, paired = eps_of(batch, "independent"), eps_of(batch, "exact")
    np.testing.assert_allclose(sorted(paired.tolist()), sorted(plain.tolist()))
    cost = np.asarray(squared_distances(batch["x"], plain))
    best = min(sum(cost[i, p] for i, p in enumerate(order)) for order in itertools.permutations(range(6)))
    np.testing.assert_allclose(((batch["x"] - paired) ** 2).sum(), best, rtol=1e-5)


def test_sinkhorn_plan_has_uniform_marginals_and_approaches_the_assignment(x64):
    x, y = jax.random.normal(jax.random.key(0), (2, 32, 2))
    cost = squared_distances(x, y)
    plan = jnp.exp(sinkhorn(cost / cost.mean(), 0.05, 1000))
    np.testing.assert_allclose(plan.sum(axis=0), 1, atol=1e-3)
    np.testing.assert_allclose(plan.sum(axis=1), 1, atol=1e-9)
    rows, columns = linear_sum_assignment(cost)
    best, entropic = cost[rows, columns].sum(), (plan * cost).sum()
    sharper = (jnp.exp(sinkhorn(cost / cost.mean(), 0.005, 2000)) * cost).sum()
    assert best < sharper < 1.05 * best < entropic < 0.4 * cost.mean() * 32


def test_sinkhorn_coupling_shortens_distances():
    batch = {"x": jax.random.normal(jax.random.key(0), (64, 2)), "cond": {}}
    distance = {name: float(((batch["x"] - eps_of(batch, name)) ** 2).sum(1).mean())
                for name in ("independent", "sinkhorn", "exact")}  # fmt: skip
    assert distance["exact"] < distance["sinkhorn"] < 0.5 * distance["independent"]


def test_target_is_the_velocity_of_the_path(batch):
    """For the straight path it is eps - x0 at every t (Liu et al. 2023, eq. 1)."""
    objective = build("objectives", "flow_matching")
    draws = objective.draw(batch, jax.random.key(1), 0, {})
    seen = {}

    def net(params, x, c_noise, cond, *, key=None):
        seen.update(x=x, c_noise=c_noise)
        return draws["eps"] - batch["x"]

    loss, _ = objective.loss(net, {"net": None}, {}, {**batch, "draws": draws}, None, 0)
    np.testing.assert_allclose(loss, 0, atol=1e-10)
    t = draws["t"][:, None]
    np.testing.assert_allclose(seen["x"], (1 - t) * batch["x"] + t * draws["eps"], rtol=1e-5)
    np.testing.assert_allclose(seen["c_noise"], 1000 * draws["t"], rtol=1e-6)


def test_contrastive_gradient(x64, batch):
    """The gradient in F is 2 / D ((F - u) - c (F - u')), where u' is the velocity of another pair (2506.05350, eq. 5).
    The pairs are drawn for the whole batch, so that the loss of an example does not depend on micro-batches."""
    objective = build("objectives", {"name": "flow_matching", "contrastive": 0.05, "coupling": "exact"})
    batch = with_draws(objective, batch, jax.random.key(1))
    draws, output = batch["draws"], jax.random.normal(jax.random.key(2), (6, 2))

    def losses(output, batch):
        return objective.loss(lambda *args, key=None: output, {"net": None}, {}, batch, None, 0)[0]

    found = jax.grad(lambda output: losses(output, batch).sum())(output)
    own, other = draws["eps"] - batch["x"], draws["other_eps"] - draws["other_x"]
    np.testing.assert_allclose(found, (output - own) - 0.05 * (output - other), rtol=1e-12)
    half = jax.tree.map(lambda leaf: leaf[::2], batch)
    np.testing.assert_array_equal(losses(output[::2], half), losses(output, batch)[::2])
    pairs = jnp.concatenate([batch["x"], draws["eps"]], axis=1).tolist()
    assert all(pair in pairs for pair in jnp.concatenate([draws["other_x"], draws["other_eps"]], axis=1).tolist())


def test_others_are_uniform_among_the_other_examples():
    drawn = np.array(jax.vmap(random_others, (0, None))(jax.random.split(jax.random.key(0), 3000), 4))
    for index in range(4):
        counts = np.bincount(drawn[:, index], minlength=4)
        assert counts[index] == 0 and abs(np.delete(counts, index) - 1000).max() < 120
    with refused("train.batch_size"):
        random_others(jax.random.key(0), 1)


def test_loss_is_logged_by_noise_level():
    objective = build("objectives", "flow_matching")
    log_snr = jnp.array([-9.0, -1.0, -1.5, 1.0, 7.0])
    draws = {"t": objective.schedule.time(log_snr), "weight": jnp.array([1.0, 1, 2, 1, 1])}
    _, metrics = objective.update_state({}, draws, jnp.array([1.0, 2, 8, 5, 6]))
    expected = {"-inf_-4": 1, "-4_-2": np.nan, "-2_0": 3, "0_2": 5, "2_4": np.nan, "4_inf": 6}
    np.testing.assert_allclose([float(metrics[f"loss_log_snr_{name}"]) for name in expected], list(expected.values()))


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"schedule": {"name": "flow", "shift": -1.0}}, "objectives.schedule.shift"),
        ({"parameterization": "eps"}, "objectives.parameterization"),
        ({"parameterization": "edm"}, "objectives.parameterization"),
        ({"schedule": "learned"}, "objectives.schedule.name"),
        ({"time_sampler": "discrete"}, "objectives.time_sampler.num_steps"),
        ({"coupling": "best"}, "objectives.coupling"),
        ({"entropy": 0.0}, "objectives.entropy"),
        ({"contrastive": 1.0}, "objectives.contrastive"),
        ({"contrastive": 0.05, "learned_weight": True}, "objectives.contrastive"),
        ({"offset_noise": -0.1}, "objectives.offset_noise"),
        ({"weighting": {"name": "min_snr", "gamma": -5.0}}, "objectives.weighting.gamma"),
    ],
)
def test_invalid_options_are_rejected(spec, field):
    with refused(field):
        build("objectives", {"name": "flow_matching", **spec})


@pytest.mark.parametrize("coupling", ["exact", "sinkhorn"])
def test_a_coupling_keeps_the_noise_of_each_class(coupling):
    """Otherwise each class would be trained with the noise nearest to it, and sampling starts from all noise."""
    label = jnp.arange(12) % 2
    x = jnp.where(label, 2.0, -2.0)[:, None] + 0.2 * jax.random.normal(jax.random.key(0), (12, 1))
    batch = {"x": x, "cond": {"label": label, "keep": jnp.ones(12, bool)}}
    plain, paired = eps_of(batch, "independent")[:, 0], eps_of(batch, coupling)[:, 0]
    for number in (0, 1):
        assert set(paired[label == number].tolist()) <= set(plain[label == number].tolist())
    with refused("objective.coupling"):
        eps_of({**batch, "cond": {"text": x}}, coupling)
