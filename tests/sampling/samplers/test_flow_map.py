import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import Denoised
from diffusion.sampling.guidance import cfg
from diffusion.sampling.loop import bind, invert, prior, sample
from tests.objectives.test_average_velocity import exact, flow, objective_of
from tests.refusals import refused
from tests.tiers import slow_except

SAMPLER = build("samplers", "flow_map")
SCHEDULES = ["flow", "trig", "vp", "edm"]
TIMES = {1: [1.0, 0.0], 2: [1.0, 0.6, 0.0], 4: [1.0, 0.7, 0.69, 0.1, 0.0]}


def start_of(path):
    keys = jax.random.split(jax.random.key(0), 64)
    return prior(path, jnp.float32(1), keys, (2,)), keys


def end_of(path, x):
    return flow(path, x, jnp.float32(1), jnp.float32(0))


@pytest.mark.parametrize("steps", TIMES)
@pytest.mark.parametrize("schedule", slow_except(("flow", "edm"), SCHEDULES), ids=str)
def test_the_exact_average_velocity_reaches_the_data(schedule, steps):
    """Any number of steps of any length is exact, with one evaluation per step."""
    objective, evaluations = objective_of(schedule=schedule), []
    path = objective.schedule
    denoise = bind(objective.denoiser(exact(path), {"net": None}), {})

    def counted(x, t, **more):
        jax.debug.callback(lambda: evaluations.append(1))
        return denoise(x, t, **more)

    x, keys = start_of(path)
    out = jax.jit(lambda: sample(counted, path, SAMPLER, x, jnp.array(TIMES[steps]), keys))()
    # At the start of edm's path, x is large, and float32 resolves only its fifth decimal place.
    np.testing.assert_allclose(out, end_of(path, x), atol=2e-4 if schedule == "edm" else 1e-5)
    jax.effects_barrier()
    assert len(evaluations) == SAMPLER.evaluations(steps) == steps


def test_inversion(x64):
    """Steps to higher times are exact too. The first time, 0.5, is where the inversion sets x to its mean."""
    objective = objective_of()
    path = objective.schedule
    denoise = bind(objective.denoiser(exact(path), {"net": None}), {})
    x0 = jax.random.normal(jax.random.key(0), (8, 2), float)
    half, one = jnp.float64(0.5), jnp.float64(1)
    out = invert(denoise, path, SAMPLER, x0, jnp.array([1.0, 0.8, 0.5, 0.0]))
    np.testing.assert_allclose(out, flow(path, 0.5 * x0, half, one), atol=1e-12)


def test_guidance_passes_the_target_time_to_both_halves():
    """The batch of 2B contains r twice. Guidance by a condition without effect has no effect."""
    objective = objective_of()
    path = objective.schedule
    x, keys = start_of(path)
    denoise = cfg(objective.denoiser(exact(path), {"net": None}), 3.0)
    out = sample(bind(denoise, {"label": jnp.zeros(64, int)}), path, SAMPLER, x, jnp.array([1.0, 0.5, 0.0]), keys)
    np.testing.assert_allclose(out, end_of(path, x), atol=1e-5)


def test_requires_a_flow_map():
    path, times = build("schedules", "flow"), jnp.array([1.0, 0.5, 0.0])
    x, keys = start_of(path)
    with refused("sampler.name"):
        sample(lambda x, t, target_time: Denoised(x), path, SAMPLER, x, times, keys)
    network = build("networks", {"name": "mlp", "width": 8, "depth": 1}, shape=(2,))
    params = {"net": jax.jit(network.init)(jax.random.key(0))}
    plain = bind(build("objectives", "flow_matching").denoiser(network.apply, params), {})
    with refused("sampler.name"):  # the network ignores the target time
        sample(plain, path, SAMPLER, x, times, keys)
