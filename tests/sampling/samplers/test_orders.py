"""The order of accuracy of each solver of the ODE, on a smooth and on a rough grid (`make orders` prints them all)."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments import orders

STEPS = 96, 192
# The slope between two numbers of steps is not the limit yet. A method that takes uneven steps for even ones, or leaves
# out its last term, is a whole order below.
ROOM = 0.4


@pytest.mark.parametrize(
    ("solver", "order"), orders.SOLVERS, ids=[orders.spell(solver) for solver, _ in orders.SOLVERS]
)
def test_order(solver, order, x64):
    measured = orders.errors(solver, STEPS)
    for rough in (False, True):
        slope = orders.slopes(measured[rough], STEPS)[0]
        assert slope > order - ROOM, f"rough={rough}"


def test_a_rough_grid_is_rough(x64):
    schedule, *_ = orders.problem()
    r = schedule.log_snr(orders.times_of(schedule, 8, True)) / 2
    np.testing.assert_allclose(np.diff(r), np.resize([1, 3], 8) * 9 / 16, rtol=1e-9)
    assert jnp.allclose(r[jnp.array([0, -1])], jnp.array(orders.ENDS))
