"""The learning rate in several cycles."""

import jax
import numpy as np
import pytest

from diffusion.core.types import InputError
from diffusion.training import optimizer


@pytest.mark.parametrize(
    ("schedule", "once"),
    [("constant", [0, 0.5, 1, 1, 1]), ("linear", [0, 0.5, 1, 2 / 3, 1 / 3]), ("cosine", [0, 0.5, 1, 0.75, 0.25])],
)
def test_warm_up_and_fall_are_repeated(schedule, once):
    """And at the end of the last cycle they are not begun again."""
    opt = optimizer.make_optimizer(steps=15, cycles=3, learning_rate=2.0, schedule=schedule, warmup=2)
    rate = jax.jit(opt.learning_rate)
    np.testing.assert_allclose([rate(step) for step in range(15)], 2 * np.tile(once, 3), atol=1e-6)
    np.testing.assert_allclose([rate(15), rate(20)], 2.0 if schedule == "constant" else 0, atol=1e-6)


def test_the_optimizer_follows_it():
    opt = optimizer.make_optimizer(
        steps=4, cycles=2, name="sgd", learning_rate=1.0, schedule="linear", warmup=1, clip=None
    )
    state, updates = opt.transform.init(np.float32(0)), []
    for _ in range(4):
        update, state = opt.transform.update(np.float32(1), state)
        updates.append(float(update))
    assert updates == [0, -1, 0, -1]


def test_a_remainder_makes_the_last_cycle_shorter():
    rate = optimizer.make_optimizer(steps=5, cycles=2, learning_rate=1.0, schedule="linear").learning_rate
    np.testing.assert_allclose([rate(step) for step in range(5)], [1, 2 / 3, 1 / 3, 1, 2 / 3], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cycles": 0}, r"^cycles: must be at least 1, got 0"),
        ({"cycles": 5, "warmup": 4}, r"^warmup: .*less than train.steps = 20 / 5 cycles, got 4"),
        ({"warmup": 20}, r"^warmup: .*less than train.steps = 20, got 20"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    optimizer.make_optimizer(steps=20, cycles=5, warmup=3)
    with pytest.raises(InputError, match=message):
        optimizer.make_optimizer(steps=20, **options)
