"""Compares our samplers with stored results of diffusers' schedulers (`tests/golden/schedulers.py`).

Both have the same initial x, times, noise and closed-form model. Without `make slow`, one case of each sampler.
`make parity` also runs the installed peers.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import expand
from diffusion.core.build import build
from diffusion.core.types import Denoised
from diffusion.sampling.guidance import threshold
from diffusion.sampling.loop import bind, sample
from tests.golden.schedulers import CASES, ORACLE, lcm_scalings
from tests.tiers import first_of_each, slow_except

# In float64 the peers agree to about 1e-12; 1e-9 allows for differences between machines.
TOLERANCE = 1e-9


def is_selected(case):
    """Returns whether the case is one of the fifth that `make slow` runs; `make parity` runs all of them."""
    last = case.name.endswith("-cosine-10") or case.name.endswith(("-linear-11", "-scaled_linear-12", "-cosine-8"))
    return case.schedule["name"] != "vp" or last or case.name == "dpm_solver_pp-3m-scaled_linear-25"


SELECTED = list(filter(is_selected, CASES))
DEFAULT = first_of_each(lambda case: case.sampler["name"], SELECTED)


def denoiser_of(case, schedule):
    denoise = ORACLE.denoiser(schedule)
    if case.threshold:
        return bind(threshold(lambda x, t, cond: denoise(x, t), **case.threshold), {})
    if case.sampler["name"] == "tcd":
        return lambda x, t, target_time: dataclasses.replace(denoise(x, t), kind="flow_map")
    if not case.lcm_boundary:
        return denoise

    def with_boundary(x, t):
        c_skip, c_out = lcm_scalings(t)
        x0 = denoise(x, t).x0
        return Denoised(expand(c_out, x) * x0 + expand(c_skip, x) * x, kind="consistency")

    return with_boundary


def ours(case, times, start):
    schedule = build("schedules", case.schedule)
    args = schedule, build("samplers", case.sampler), jnp.asarray(start), jnp.asarray(times), jax.random.key(0)
    return np.asarray(jax.jit(lambda: sample(denoiser_of(case, schedule), *args))())


@pytest.mark.parametrize("case", slow_except(DEFAULT, SELECTED), ids=lambda case: case.name)
def test_agrees_with_the_peer(case, golden, x64):
    times, start, x = (golden[f"{case.name}/{key}"] for key in ("times", "start", "x"))
    found = ours(case, times, start)
    if case.peer_halves_second_derivative:
        corrected = golden[f"{case.name}/mended"]
        np.testing.assert_allclose(found, corrected, atol=TOLERANCE * abs(corrected).max())
        assert abs(x - corrected).max() > 1e-4 * abs(corrected).max()  # the peer's uncorrected result differs
    else:
        np.testing.assert_allclose(found, x, atol=TOLERANCE * abs(x).max())
