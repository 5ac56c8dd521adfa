"""Measures the order of accuracy of every ODE solver, on a mixture whose denoiser is a closed form, in float64.

python -m experiments.orders [--samplers=heun,unipc]

The error after N steps is measured against SciPy's adaptive method of eighth order; its slope in log N is the order.
The grids are a smooth one (uniform in log-SNR) and a rough one (steps in log-SNR alternate 1 : 3), which exposes a
solver that treats uneven steps as even.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from scipy.integrate import solve_ivp

from diffusion.core.build import build
from diffusion.core.types import Array, InputError, Schedule
from diffusion.process.analytic import Mixture
from diffusion.sampling.loop import sample
from experiments import cli

SAMPLERS = flags.DEFINE_list("samplers", None, "Names of samplers to measure. Default: all ODE solvers.")
MIXTURE = Mixture([[1.0, 0.5], [-1.0, 0.2], [0.2, -1.0]], [0.5, 0.4, 0.6], [0.5, 0.3, 0.2])
# log(alpha / sigma) at the first and the last time. Both are finite, as a step to infinity reduces the order.
ENDS = -7.0, 2.0
# Each solver with its theoretical order.
SOLVERS = (
    ({"name": "euler"}, 1),
    ({"name": "ddim"}, 1),
    ({"name": "heun"}, 2),
    ({"name": "dpm2"}, 2),
    ({"name": "lms", "order": 2}, 2),
    ({"name": "lms", "order": 4}, 4),
    ({"name": "dpm_solver", "order": 2}, 2),
    ({"name": "dpm_solver", "order": 3}, 3),
    ({"name": "dpm_solver", "order": 2, "singlestep": False}, 2),
    ({"name": "dpm_solver", "order": 3, "singlestep": False}, 3),
    ({"name": "dpm_solver_pp", "order": 2, "singlestep": True}, 2),
    ({"name": "dpm_solver_pp", "order": 3, "singlestep": True}, 3),
    ({"name": "dpm_solver_pp", "order": 2}, 2),
    ({"name": "dpm_solver_pp", "order": 3}, 3),
    ({"name": "deis", "order": 2}, 2),
    ({"name": "deis", "order": 3}, 3),
    ({"name": "unipc", "order": 1, "variant": "bh1"}, 2),
    ({"name": "unipc", "order": 2, "variant": "bh1"}, 3),
    ({"name": "unipc", "order": 2}, 3),
    ({"name": "unipc", "order": 3}, 4),
    ({"name": "unipc", "order": 2, "prediction": "eps"}, 3),
    ({"name": "dpm_solver", "order": 2, "inner_points": "grid"}, 2),
    ({"name": "dpm_solver_pp_sde", "eta": 0.0}, 2),
    ({"name": "res", "order": 2}, 2),
    ({"name": "res", "order": 3}, 3),
    ({"name": "sa_solver", "tau": 0.0}, 2),
    ({"name": "ipndm"}, 1),  # higher only where the steps of sigma / alpha are even
    ({"name": "gradient_estimation"}, 1),
    ({"name": "rk4"}, 4),
)
STEPS = 96, 192, 384, 768


def times_of(schedule: Schedule, steps: int, rough: bool) -> Array:
    """Returns the smooth or the rough time grid, `[steps + 1]`."""
    weights = np.resize([1.0, 3.0], steps) if rough else np.ones(steps)
    share = np.concatenate([[0], np.cumsum(weights)]) / weights.sum()
    return schedule.time(2 * jnp.asarray(ENDS[0] + (ENDS[1] - ENDS[0]) * share))


@functools.cache
def problem() -> tuple[Schedule, np.ndarray, np.ndarray]:
    """Returns the schedule, four start points `[4, 2]`, and the exact end points of their ODE trajectories `[4, 2]`."""
    schedule = build("schedules", {"name": "vp", "beta_end": 0.05})
    first, last = (float(schedule.time(jnp.float64(2 * end))) for end in ENDS)
    start = np.random.default_rng(0).normal(size=(4, 2))

    @jax.jit
    def slope(r: Array, z: Array) -> Array:
        # d(x / sigma) / dr = (alpha / sigma) x0 at r = log(alpha / sigma).
        t = schedule.time(2 * r)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return (jnp.exp(r) * MIXTURE.denoise(sigma * z.reshape(4, 2), alpha, sigma)).ravel()

    z = (start / float(schedule.sigma(jnp.float64(first)))).ravel()
    end = solve_ivp(slope, ENDS, z, method="DOP853", rtol=1e-12, atol=1e-12).y[:, -1]
    return schedule, start, end.reshape(4, 2) * float(schedule.sigma(jnp.float64(last)))


def errors(solver: dict, steps: tuple[int, ...]) -> dict[bool, np.ndarray]:
    """Returns the RMS error for each number of steps, on the smooth grid (key False) and the rough one (key True).

    Requires float64.
    """
    schedule, start, end = problem()
    sampler = build("samplers", solver)

    @jax.jit
    def run(times: Array) -> Array:
        x = sample(MIXTURE.denoiser(schedule), schedule, sampler, jnp.asarray(start), times, jax.random.key(0))
        return jnp.sqrt(jnp.mean((x - end) ** 2))

    return {
        rough: np.array([float(run(times_of(schedule, count, rough))) for count in steps]) for rough in (False, True)
    }


def slopes(error: np.ndarray, steps: tuple[int, ...]) -> np.ndarray:
    """Returns the empirical order between consecutive numbers of steps."""
    return -np.diff(np.log(error)) / np.diff(np.log(steps))


def spell(solver: dict) -> str:
    """Returns a solver as text: `lms order=2`."""
    return " ".join([solver["name"], *(f"{key}={value}" for key, value in solver.items() if key != "name")])


def main() -> None:
    known = {solver["name"]: None for solver, _ in SOLVERS}
    chosen = SAMPLERS.value or known
    for name in chosen:
        if name not in known:
            raise InputError("--samplers", f"{name!r} has no order here; one of: {', '.join(known)}")
    with jax.enable_x64(True):
        print(f"{'solver':44} order   smooth   rough   error at {STEPS[-1]} steps: smooth, rough")
        for solver, order in SOLVERS:
            if solver["name"] not in chosen:
                continue
            measured = errors(solver, STEPS)
            found = [slopes(measured[rough], STEPS)[-1] for rough in (False, True)]
            ends = [measured[rough][-1] for rough in (False, True)]
            print(
                f"{spell(solver):44} {order:5} {found[0]:8.2f} {found[1]:7.2f}   {ends[0]:.1e}, {ends[1]:.1e}",
                flush=True,
            )


if __name__ == "__main__":
    cli.run(main)
