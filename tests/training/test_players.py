"""Objectives with several losses: whose gradients go where, and when each player makes a step."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import Player
from diffusion.objectives.gan import GAN
from diffusion.process.analytic import Mixture
from diffusion.training.ema import make_ema
from diffusion.training.optimizer import make_optimizer
from diffusion.training.resilience.guards import Guard
from diffusion.training.state import init_state
from diffusion.training.step import make_step
from tests.refusals import refused

NETWORK = build("networks", {"name": "mlp", "width": 8, "depth": 1}, shape=(2,))
EMA = make_ema(decays=(0.5,), warmup=False)
OPTIMIZER = make_optimizer(steps=100, name="sgd", learning_rate=0.1, clip=None,
                           players={"critic": {"name": "adam", "learning_rate": 0.01}})  # fmt: skip
X = jax.random.normal(jax.random.key(7), (16, 2)) + 2


def gan(**options) -> GAN:
    return build("objectives", {"name": "gan", **options})


def run(objective, steps, *, x=X, optimizer=OPTIMIZER, **options):
    """Returns the states before and after every step, and the metrics."""
    state = init_state(objective, NETWORK, optimizer, EMA, jax.random.key(0))
    key = jax.random.key(1)  # so that no gradient is 0, as it is where the last layer is
    noise = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(key, p.shape), state.params)
    state = dataclasses.replace(state, params=noise)
    step = jax.jit(make_step(objective, NETWORK, optimizer, EMA, seed=0, **options))
    states, metrics = [state], []
    for _ in range(steps):
        state, measured = step(state, {"x": x, "cond": {}})
        states.append(state)
        metrics.append(measured)
    return states, metrics


def same(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def test_each_loss_moves_the_networks_of_its_player_alone():
    """A step equals the two steps, each with the gradient of one loss, that an explicit computation makes."""
    objective = gan(r1=0.1)
    (before, after), (metrics,) = run(objective, 1)
    batch = {"x": X, "cond": {"keep": jnp.ones(16, bool)}}
    key_draw = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 3)[1]
    batch["draws"] = objective.draw(batch, key_draw, 0, {})

    @functools.partial(jax.jit, static_argnums=1)
    def loss(params, player):
        losses, _ = objective.losses(NETWORK.apply, params, {}, batch, None, 0)
        return jnp.mean(losses[player])

    of_generator = jax.grad(lambda net: loss({**before.params, "net": net}, "generator"))(before.params["net"])
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, before.params["net"], of_generator)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), after.params["net"], expected)
    of_critic = jax.grad(lambda critic: loss({**before.params, "critic": critic}, "critic"))(before.params["critic"])
    moved = jax.tree.map(lambda a, b: a - b, after.params["critic"], before.params["critic"])
    for change, slope in zip(jax.tree.leaves(moved), jax.tree.leaves(of_critic), strict=True):
        clear = np.abs(slope) > 1e-4  # Adam's first step is its learning rate against the sign of the gradient
        np.testing.assert_allclose(change[clear], -0.01 * np.sign(slope[clear]), rtol=1e-3)
    for player in ("generator", "critic"):
        np.testing.assert_allclose(metrics[f"loss_{player}"], loss(before.params, player), rtol=1e-5)
    assert after.ema["0.5"].keys() == {"net"} and after.opt_state.keys() == {"critic", "generator"}


def test_players_make_their_steps_and_no_others():
    states, _ = run(gan(generator_every=3), 7)
    for step, (before, after) in enumerate(itertools.pairwise(states)):
        assert not same(before.params["critic"], after.params["critic"])
        assert same(before.params["net"], after.params["net"]) == (step % 3 != 0)
    counts = [int(leaf) for leaf in jax.tree.leaves(states[-1].opt_state["critic"]) if leaf.dtype == jnp.int32]
    assert counts and set(counts) == {7}
    counts = [int(leaf) for leaf in jax.tree.leaves(states[-1].opt_state["generator"]) if leaf.dtype == jnp.int32]
    assert counts and set(counts) == {3}


def test_accumulation_changes_nothing():
    (_, whole), (expected,) = run(gan(r1=0.1), 1)
    (_, parts), (metrics,) = run(gan(r1=0.1), 1, accumulate=4)
    for a, b in zip(jax.tree.leaves(parts.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)  # Adam divides small gradients by their size
    np.testing.assert_allclose(metrics["loss_critic"], expected["loss_critic"], rtol=1e-5)


def test_a_bad_step_changes_no_player():
    (before, after), (metrics,) = run(gan(), 1, x=X.at[3].set(jnp.nan), guard=Guard())
    assert same((before.params, before.ema, before.opt_state), (after.params, after.ema, after.opt_state))
    assert metrics["bad_steps"] == 1


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"generator_every": 0}, "objectives.generator_every"),
        ({"r1": -1.0}, "objectives.r1"),
        ({"parameterization": "eps"}, "objectives.parameterization"),
        ({"schedule": "learned"}, "objectives.schedule.name"),
    ],
)
def test_invalid_options(options, field):
    with refused(field):
        gan(**options)


def test_a_second_head_is_refused():
    with refused("network.outputs"):
        gan().init(dataclasses.replace(NETWORK, outputs=2), jax.random.key(0))


@pytest.mark.slow
def test_critic_reaches_the_log_ratio():
    """An untrained generator returns its noise, so the critic learns log p_data - log N(0, I)."""
    data = Mixture(means=[[0.8, 0.0], [-0.8, 0.4]], stds=[0.5, 0.4], weights=[0.5, 0.5])
    network = build("networks", {"name": "mlp", "width": 32, "depth": 2}, shape=(2,))
    steps, batch = 1000, 1024
    optimizer = make_optimizer(steps=steps, name="adam", learning_rate=3e-3, schedule="cosine")
    objective = gan(generator_every=10 * steps)
    objective = dataclasses.replace(objective, players={**objective.players, "critic": Player(("critic",))})
    averages = make_ema(decays=(0.995,))
    state = init_state(objective, network, optimizer, averages, jax.random.key(0))
    start = jax.device_get(state.params["net"])
    rng = np.random.default_rng(0)
    means, stds = np.asarray(data.means), np.asarray(data.stds)

    def points(count):
        which = rng.integers(2, size=count)
        return (means[which] + stds[which, None] * rng.normal(size=(count, 2))).astype(np.float32)

    step = jax.jit(make_step(objective, network, optimizer, averages, seed=0), donate_argnums=0)
    # The generator's first step is at step 0; the state begins at step 1.
    state = dataclasses.replace(state, step=jnp.int32(1))
    for _ in range(steps):
        state, _ = step(state, {"x": points(batch), "cond": {}})
    assert same(state.params["net"], start)
    x = points(4096)
    squares = ((x[:, None] - means) ** 2).sum(-1)
    log_data = jax.nn.logsumexp(-squares / (2 * stds**2) - np.log(2 * np.pi * stds**2), axis=1, b=np.array([0.5, 0.5]))
    log_noise = -(x**2).sum(-1) / 2 - np.log(2 * np.pi)
    found = objective.critic(network.apply, state.ema["0.995"]["critic"], jnp.asarray(x), {})
    rms = float(np.sqrt(np.mean((np.asarray(found) - (log_data - log_noise)) ** 2)))
    print(f"root mean square error of the log-ratio: {rms:.4f}")
    assert rms <= 0.05
