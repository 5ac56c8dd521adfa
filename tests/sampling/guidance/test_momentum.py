"""The momentum of `apg`: a memory that the sampling loop carries from step to step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build, names
from diffusion.sampling.guidance import apg, interval
from diffusion.sampling.loop import bind, invert, sample
from tests.refusals import refused
from tests.sampling.guidance.closed_form import COND, FLOW, X, close, dot, halves, model, x0_of
from tests.tiers import slow_except

TIMES = jnp.array([0.9, 0.6, 0.3, 0.0])


def drawn(denoise, sampler="ddim", times=TIMES, **options):
    sampler, key = build("samplers", sampler), jax.random.key(0)
    return jax.jit(lambda times: sample(bind(denoise, COND), FLOW, sampler, X, times, key, **options))(times)


def by_hand(momentum, scale=4.0, eta=0.3, norm=2.5, times=TIMES, guided=lambda t: True):
    """DDIM on the straight path with algorithm 1 of arXiv 2410.02416, whose running average starts at 0."""
    x, average = np.float64(X), 0.0
    for t, s in zip(np.float64(times)[:-1], np.float64(times)[1:], strict=True):
        conditional, unconditional = (np.float64(x0_of(x, t, level)) for level in (COND["label"], -2.0))
        x0 = conditional
        if guided(t):
            average = conditional - unconditional + momentum * average
            difference = average * np.minimum(1, norm / np.sqrt(dot(average, average)))
            parallel = dot(difference, conditional) / dot(conditional, conditional) * conditional
            x0 = conditional + (scale - 1) * (difference - parallel + eta * parallel)
        x = (1 - s) * x0 + s / t * (x - (1 - t) * x0)
    return x


@pytest.mark.parametrize("momentum", [-0.75, 0.5])
def test_apg_with_momentum_in_a_sampler(momentum):
    found = drawn(apg(model, 4.0, 0.3, 2.5, momentum), memory=True)
    close(found, by_hand(momentum), 1e-4)
    assert abs(found - by_hand(0.0)).max() > 0.01


def test_the_first_evaluation_has_no_momentum():
    conditional, _ = halves(0.35)
    found, without = (apg(model, 4.0, 0.3, 2.5, momentum)(X, 0.35, COND) for momentum in (0.5, 0.0))
    close(found.x0, without.x0)
    assert without.memory is None and found.memory.shape == X.shape
    close(found.conditional, conditional)


def test_the_memory_is_kept_outside_of_an_interval():
    guided = interval(apg(model, 4.0, 0.3, 2.5, 0.5), 0.2, 0.5, plain=model, schedule=FLOW)
    times = jnp.array([0.9, 0.5, 0.45, 0.1, 0.0])
    close(drawn(guided, times=times, memory=True), by_hand(0.5, times=times, guided=lambda t: 0.2 < t < 0.51), 1e-4)


def test_a_sampler_of_two_evaluations_remembers_the_first():
    """Both receive the memory of the step before."""
    calls = []

    def denoise(x, t, cond):
        denoised = apg(model, 4.0, momentum=0.5)(x, t, cond)
        memory = cond.get("memory", jnp.zeros_like(x))
        jax.debug.callback(lambda *values: calls.append(values), memory, denoised.memory, ordered=True)
        return denoised

    jax.block_until_ready(drawn(denoise, "heun", jnp.array([0.9, 0.6, 0.3]), memory=True))
    jax.effects_barrier()
    assert len(calls) == 4
    for (received, _), expected in zip(calls, [np.zeros_like(X)] * 2 + [calls[0][1]] * 2, strict=True):
        np.testing.assert_array_equal(received, expected)
    assert abs(calls[1][1] - calls[0][1]).max() > 1e-3


FLOW_SAMPLERS = sorted(set(names("samplers")) - {"consistency", "lcm", "tcd", "flow_map", "rk45"})


@pytest.mark.parametrize("sampler", slow_except(["euler", "rk4"], FLOW_SAMPLERS))
def test_every_sampler_carries_the_memory(sampler):
    options = {"predictor": "ddim"} if sampler == "predictor_corrector" else {}
    found, without = (
        drawn(apg(model, 4.0, momentum=momentum), {"name": sampler, **options}, memory=momentum != 0)
        for momentum in (0.5, 0.0)
    )
    assert np.isfinite(found).all() and abs(found - without).max() > 1e-3


def test_added_noise_forgets_the_memory():
    """The steps after it are those of a run that starts there."""
    guided, times = apg(model, 4.0, momentum=0.5), jnp.array([0.9, 0.5, 0.7, 0.4, 0.0])
    path = drawn(guided, times=times, memory=True, renoise=True, trajectory=True)
    again = jax.jit(lambda x: sample(bind(guided, COND), FLOW, build("samplers", "ddim"), x, times[2:],
                                     jax.random.key(0), memory=True))(path[2])  # fmt: skip
    close(path[-1], again)


def test_momentum_requires_a_loop_that_passes_it_on():
    guided = apg(model, 4.0, momentum=0.5)
    with refused("guidance.momentum"):
        drawn(guided)
    with refused("guidance.momentum"):
        invert(bind(guided, COND), FLOW, build("samplers", "ddim"), X, TIMES)
    with refused("sampler.name"):
        drawn(guided, "rk45", memory=True)


@pytest.mark.parametrize("momentum", [1.0, -1.0])
def test_the_momentum_is_below_1(momentum):
    with refused("momentum"):
        apg(model, 4.0, momentum=momentum)
