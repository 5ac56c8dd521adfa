"""Every objective with every parameterization and schedule that there is, and with every network, found by listing the
folders: what makes sense trains three steps and samples two on a mesh of devices, what does not is refused at build. A
new file enrols itself; if it has limits, they belong in `refusal`.

A network sees x, a number and the condition, whatever the parameterization and the schedule are, so those have two
small networks in turn, and every network has every objective. A sampler sees nothing but the denoiser and the schedule:
`samplers/test_every.py` has each of them on every kind of schedule.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.build import build, names
from diffusion.distributed import sharding
from diffusion.sample import bind, prior, sample
from diffusion.training import ema, optimizer
from diffusion.training.state import averaged, init_state
from diffusion.training.step import make_step
from diffusion.types import InputError

TINY = {
    "unet": {"width": 4, "multipliers": (1, 2), "blocks": 1, "attention": (), "head_width": 4},
    "mlp": {"width": 8, "depth": 1},
    "dit": {"width": 8, "depth": 2, "heads": 2, "patch": 4},
    "uvit": {"width": 8, "depth": 3, "heads": 2, "patch": 4},
    "edm2": {"width": 4, "multipliers": (1, 2), "blocks": 1, "attention": (), "head_width": 4},
}
PURE_NOISE = ("flow", "trig")  # schedules whose SNR at t = 1 is 0


def refusal(objective, parameterization, schedule):
    """The field that is named when the combination makes no sense; None if it does."""
    if (objective == "vdm") != (schedule == "learned"):
        return "objective.schedule.name"
    if schedule in PURE_NOISE and parameterization in ("eps", "score"):
        return "objective.parameterization"
    if objective == "vdm" and parameterization == "velocity":
        return "objective.parameterization.name"
    return None


OBJECTIVES, NETWORKS = names("objectives"), names("networks")


def combinations():
    """Objective, network, parameterization, schedule."""
    turns = itertools.cycle(("mlp", "dit"))
    for objective, parameterization, schedule in itertools.product(
        OBJECTIVES, names("parameterization"), names("schedules")
    ):
        refused = refusal(objective, parameterization, schedule)
        yield objective, NETWORKS[0] if refused else next(turns), parameterization, schedule
    for objective, network in itertools.product(OBJECTIVES, NETWORKS):
        yield objective, network, "x0", "learned" if objective == "vdm" else "trig"


@pytest.fixture(scope="module")
def networks(digits, mesh_of):
    """Each network with its pass compiled once, whatever is built around it, and its parameters."""
    made = {}
    for name in names("networks"):
        network = build("networks", {"name": name, **TINY.get(name, {})}, shape=digits.spec.shape, num_classes=10)
        params = jax.jit(network.init)(jax.random.key(0))
        made[name] = dataclasses.replace(network, init=lambda key, params=params: params, apply=jax.jit(network.apply))
    return made


@pytest.mark.parametrize("combination", sorted(set(combinations())), ids="-".join)
def test_trains_and_samples_or_is_refused(combination, networks, digits_batch, mesh_of):
    objective, network, parameterization, schedule = combination
    spec = {
        "name": objective,
        "schedule": schedule,
        "parameterization": {"name": parameterization, "c_noise": "time"},
        "times": "uniform",
    }
    field = refusal(objective, parameterization, schedule)
    if field:
        with pytest.raises(InputError, match=f"^{field}: .{{10}}"):
            build("objectives", spec, field="objective")
        return

    objective, network = build("objectives", spec, field="objective"), networks[network]
    mesh = mesh_of(2, 1, 1)
    opt, averages = optimizer.make(steps=3, name="sgd", learning_rate=1e-4), ema.make(decays=(0.5,))
    state = init_state(objective, network, opt.transform, averages, jax.random.key(0))
    batch = jax.tree.map(lambda x: np.asarray(x[:4]), digits_batch)
    state = jax.device_put(state, sharding.of_state(state, mesh))
    batch = sharding.to_global(batch, sharding.by_example(mesh))
    before = jax.tree.leaves(state.params["net"])
    # Not jitted as a whole: a compilation for each of hundreds of combinations would take an hour.
    step = make_step(objective, network, opt, averages, seed=0, cond_drop_rate=0.5)
    for _ in range(3):
        state, metrics = step(state, batch)
        assert np.isfinite(metrics["loss"])
    assert any((a != b).any() for a, b in zip(before, jax.tree.leaves(state.params["net"]), strict=True))

    params = averaged(state, "0.5")
    cond = {"label": jax.device_put(jnp.arange(2), sharding.by_example(mesh))}
    denoise = bind(objective.denoiser(network.apply, params), cond)
    path = objective.schedule_for(params)
    times = jnp.array([1.0, 0.5, 0.0])
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.disable_jit():
        x = prior(path, times[0], keys, (8, 8, 1))
        x = sample(denoise, path, build("samplers", "ddim"), x, times, keys)
    assert x.shape == (2, 8, 8, 1) and np.isfinite(x).all()
