"""Learning rate schedules, once and in cycles."""

import jax
import numpy as np
import pytest

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
        ({"mu_dtype": {}}, "options"),
    ],
)
def test_bad_options(options, field):
    make_optimizer(steps=20, cycles=5, warmup=3)
    with refused(field):
        make_optimizer(steps=20, **options)
