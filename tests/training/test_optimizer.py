"""Optimizers: learning rate schedules, weight decay, and groups of parameters."""

import jax
import numpy as np
import pytest

from diffusion.core import trees
from diffusion.training.optimizer import make_optimizer
from tests.refusals import refused


@pytest.mark.parametrize(
    ("schedule", "cycle"),
    [("constant", [0, 0.5, 1, 1, 1]), ("linear", [0, 0.5, 1, 2 / 3, 1 / 3]), ("cosine", [0, 0.5, 1, 0.75, 0.25])],
)
def test_warmup_and_decay_are_repeated(schedule, cycle):
    """After the last cycle they do not start again."""
    optimizer = make_optimizer(steps=15, cycles=3, learning_rate=2.0, schedule=schedule, warmup=2)
    rate = jax.jit(optimizer.learning_rate)
    np.testing.assert_allclose([rate(step) for step in range(15)], 2 * np.tile(cycle, 3), atol=1e-6)
    np.testing.assert_allclose([rate(15), rate(20)], 2.0 if schedule == "constant" else 0, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0, 0.5, 1, 1, 1]), ("linear", [0, 0.5, 1, 0.75, 0.5]), ("cosine", [0, 0.5, 1, 0.853553, 0.5])],
)
def test_a_single_cycle(schedule, expected):
    rate = make_optimizer(steps=6, learning_rate=1.0, schedule=schedule, warmup=2).learning_rate
    np.testing.assert_allclose([rate(step) for step in range(5)], expected, atol=1e-6)


def test_updates_use_the_learning_rate():
    optimizer = make_optimizer(steps=4, cycles=2, name="sgd", learning_rate=1.0, schedule="linear", warmup=1, clip=None)
    state, updates = optimizer.transform.init(np.float32(0)), []
    for _ in range(4):
        update, state = optimizer.transform.update(np.float32(1), state)
        updates.append(float(update))
    assert updates == [0, -1, 0, -1]


def test_a_remainder_shortens_the_last_cycle():
    rate = make_optimizer(steps=5, cycles=2, learning_rate=1.0, schedule="linear").learning_rate
    np.testing.assert_allclose([rate(step) for step in range(5)], [1, 2 / 3, 1 / 3, 1, 2 / 3], atol=1e-6)


def test_a_short_run_shortens_the_warmup(caplog):
    rate = make_optimizer(steps=40, cycles=2, learning_rate=1.0, warmup=20).learning_rate
    assert "warmup" in caplog.text
    np.testing.assert_allclose([rate(step) for step in (0, 1, 2, 19, 21)], [0, 0.5, 1, 1, 0.5])


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"cycles": 0}, "cycles"),
        ({"warmup": -1}, "warmup"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"clip": -1.0}, "clip"),
        ({"name": "chain"}, "name"),
        ({"name": "sm3"}, "name"),
        ({"name": "lbfgs"}, "name"),
        ({"b1": "x"}, "b1"),
        ({"mask": {"net": True}}, "mask"),
        ({"mu_dtype": ()}, "mu_dtype"),
        ({"mu_dtype": "x"}, "name"),
        ({"groups": {"net": {"mask": {}}}}, "groups.net.mask"),
    ],
)
def test_bad_options(options, field):
    make_optimizer(steps=20, cycles=5, warmup=3)
    with refused(field):
        make_optimizer(steps=20, **options)


PARAMS = {
    "net": {"linear": {"kernel": np.ones((2, 2)), "bias": np.ones(2)}, "norm": {"scale": np.ones((3, 2))},
            "label": {"embedding": np.ones((4, 2))}, "blocks": {"kernel1": np.ones((3, 2, 2))}},
}  # fmt: skip


def moved(optimizer, grads=None):
    """Returns the change of every parameter in one step, by path; without gradients, weight decay alone moves them."""
    zeros = jax.tree.map(np.zeros_like, PARAMS)
    after, _ = optimizer.update(grads or zeros, optimizer.init(PARAMS), PARAMS, 0)
    return {path: np.max(np.abs(leaf - 1)) for path, leaf in trees.by_path(after).items()}


def test_weight_decay_spares_biases_norms_and_embeddings():
    changes = moved(make_optimizer(steps=10, name="adamw", learning_rate=0.1, weight_decay=0.5))
    for path, change in changes.items():
        np.testing.assert_allclose(change, 0.05 if "kernel" in path else 0, rtol=1e-6, err_msg=path)


def test_groups_have_their_options():
    """The first expression that is found counts, and None keeps the parameters as they are."""
    groups = {"bias": None, "^net/linear/": {"learning_rate": 0.2}, "blocks": {"weight_decay": 0.0}}
    optimizer = make_optimizer(steps=10, name="adamw", learning_rate=0.1, weight_decay=0.5, groups=groups, clip=None)
    decayed = moved(optimizer)
    assert decayed["net/linear/kernel"] == pytest.approx(0.1) and decayed["net/blocks/kernel1"] == 0
    stepped = moved(optimizer, jax.tree.map(np.ones_like, PARAMS))
    assert stepped["net/linear/bias"] == 0 and stepped["net/blocks/kernel1"] == pytest.approx(0.1, rel=1e-4)
    assert stepped["net/norm/scale"] == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"groups": {"net/(": None}}, "groups"),
        ({"groups": {"net": 3}}, "groups.net"),
        ({"groups": {"net": {"learning_rate": -1.0}}}, "groups.net.learning_rate"),
        ({"groups": {"net": {"no_such": 1.0}}}, "groups.net.no_such"),
        ({"players": {"critic": 3}}, "players.critic"),
        ({"players": {"critic": {"warmup": -1}}}, "players.critic.warmup"),
    ],
)
def test_invalid_groups_and_players(options, field):
    with refused(field):
        make_optimizer(steps=10, **options).init(PARAMS)


def test_muon_orthogonalises_the_kernels_of_each_block():
    """The first update of a kernel has equal singular values, up to the error of five steps, and Adam's equal sizes."""
    optimizer = make_optimizer(steps=4, name="muon", learning_rate=1.0, clip=None)
    rng = np.random.default_rng(0)
    shapes = {
        "linear": {"kernel": (6, 8), "bias": (8,)},
        "conv": {"kernel": (3, 3, 2, 4)},
        "in_blocks": {"blocks": {"up": {"kernel": (2, 6, 8), "bias": (2, 8)}}},
        "blocks": {"0": {"kernel": (6, 8)}},
        "table": {"embedding": (5, 6)},
    }
    grads = jax.tree.map(lambda shape: np.float32(rng.normal(size=shape)), shapes, is_leaf=lambda x: type(x) is tuple)
    updates, _ = optimizer.transform.update(grads, optimizer.transform.init(grads), grads)
    conv = updates["conv"]["kernel"].reshape(-1, 4)
    stacked, alone = updates["in_blocks"]["blocks"]["up"], updates["blocks"]["0"]["kernel"]
    for kernel in (updates["linear"]["kernel"], conv, alone, *stacked["kernel"]):
        values = np.linalg.svd(kernel, compute_uv=False)
        assert values.max() < 2 * values.min()
    for part in (updates["linear"]["bias"], stacked["bias"], updates["table"]["embedding"]):
        np.testing.assert_allclose(np.abs(part), np.abs(part).max(), rtol=1e-3)
