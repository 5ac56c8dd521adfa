"""Measures the order of accuracy of each ODE solver on a smooth and on a rough grid (`make orders` prints them all).

Without `make slow`, solvers of orders 1 to 4: single-step, Runge-Kutta, and both kinds of multistep solvers.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.sampling.ode.exponential import _stage
from experiments import orders
from tests.tiers import slow_except

STEPS = 96, 192
# The slope between two numbers of steps deviates from its limit. A method that treats uneven steps as even, or lacks
# its last term, is a whole order below.
MARGIN = 0.4


DEFAULT = ("euler", "dpm_solver_pp order=3 singlestep=True", "lms order=4", "unipc order=3")


@pytest.mark.parametrize(
    ("solver", "order"),
    slow_except(lambda case: orders.spell(case[0]) in DEFAULT, orders.SOLVERS),
    ids=[orders.spell(solver) for solver, _ in orders.SOLVERS],
)
def test_order(solver, order, x64):
    measured = orders.errors(solver, STEPS)
    for rough in (False, True):
        slope = orders.slopes(measured[rough], STEPS)[0]
        assert slope > order - MARGIN, f"rough={rough}"


def test_the_rough_grid_alternates_its_steps(x64):
    schedule, *_ = orders.problem()
    r = schedule.log_snr(orders.times_of(schedule, 8, True)) / 2
    np.testing.assert_allclose(np.diff(r), np.resize([1, 3], 8) * 9 / 16, rtol=1e-9)
    assert jnp.allclose(r[jnp.array([0, -1])], jnp.array(orders.ENDS))


def test_stages_of_the_singlestep_solver():
    """Order 3 on 8 intervals: Runge-Kutta steps of 3, 3 and 2 stages, of which the ends may be steps by themselves."""

    def table(steps, *alone):
        """Returns the stage, the number of stages and the end of each interval."""
        return [[int(part) for part in _stage(jnp.int32(i), jnp.int32(steps), 3, *map(jnp.bool_, alone))]
                for i in range(steps)]  # fmt: skip

    divisions = {(0, 0): [3, 3, 2], (0, 1): [3, 3, 1, 1], (1, 0): [1, 3, 3, 1], (1, 1): [1, 3, 3, 1]}
    for (first_alone, last_alone), lengths in divisions.items():
        rows = [(stage, n, end) for n, end in zip(lengths, np.cumsum(lengths), strict=True) for stage in range(n)]
        np.testing.assert_array_equal(table(8, first_alone, last_alone), rows)
    assert [[row[1] for row in table(9, 0, last)] for last in (0, 1)] == [[3] * 9, [3] * 6 + [2, 2, 1]]
    assert table(1, 1, 1) == [[0, 1, 1]]
