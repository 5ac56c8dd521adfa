"""Our samplers against the points that diffusers' schedulers reach from the same start, over the same times, with the
same noise and the same closed-form model (`tests/golden/schedulers.py`). `make parity` runs the live peers as well."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import expand
from diffusion.core.build import build
from diffusion.core.types import Denoised
from diffusion.sampling.loop import sample
from tests.golden.schedulers import CASES, ORACLE, lcm_scalings

# Peers in float64 agree to about 1e-12; 1e-9 leaves room for other machines.
TOLERANCE = 1e-9


def often(case):
    """About one of five, to save time: `make parity` runs them all."""
    last = case.name.endswith("-cosine-10") or case.name.endswith(("-linear-11", "-scaled_linear-12", "-cosine-8"))
    return case.schedule["name"] != "vp" or last or case.name == "dpm_solver_pp-3m-scaled_linear-25"


def denoiser_of(case, schedule):
    denoise = ORACLE.denoiser(schedule)
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


@pytest.mark.parametrize("case", filter(often, CASES), ids=lambda case: case.name)
def test_reaches_the_peers_point(case, golden, x64):
    times, start, x = (golden[f"{case.name}/{key}"] for key in ("times", "start", "x"))
    found = ours(case, times, start)
    if case.peer_halves_second_derivative:
        mended = golden[f"{case.name}/mended"]
        np.testing.assert_allclose(found, mended, atol=TOLERANCE * abs(mended).max())
        assert abs(x - mended).max() > 1e-4 * abs(mended).max()  # the peer's own is another
    else:
        np.testing.assert_allclose(found, x, atol=TOLERANCE * abs(x).max())
