"""Every objective with every parameterization, schedule and network, found by listing the folders. A valid combination
trains three steps and samples two on a mesh of devices; an invalid one is rejected when it is built. A new file is
included automatically; its limits, if any, belong in `refusal`.

A network receives x, a noise label and the condition, independently of the parameterization and the schedule, so their
combinations are tested with the smallest network, and every network is tested with every objective. Few-step methods,
which have a fixed path and parameterization, or those of their teacher, are tested with a few networks. A sampler
depends on the denoiser and the schedule alone: `sampling/samplers/test_every.py` tests each on every kind of schedule.

Without `make slow`, denoising is tested with two kinds of networks, and the other objectives with the smallest one,
unless `objectives/test_resume.py` trains them there.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build, names
from diffusion.distributed import sharding
from diffusion.objectives.base.teacher import Teacher
from diffusion.sampling.loop import bind, prior, sample
from diffusion.training import ema, optimizer
from diffusion.training.state import averaged, init_state
from diffusion.training.step import make_step
from tests.refusals import refused
from tests.tiers import slow_except

TINY = {
    "unet": {"width": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (), "head_dim": 4},
    "unet_text": {"width": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "depth": (0, 0), "num_heads": 2},
    "mlp": {"width": 8, "depth": 1},
    "dit": {"width": 8, "depth": 2, "num_heads": 2, "patch_size": 4},
    "uvit": {"width": 8, "depth": 3, "num_heads": 2, "patch_size": 4},
    "edm2": {"width": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (), "head_dim": 4},
}
# Options of an objective in addition to its defaults; `teacher` is the parameterization of a suitable teacher.
OPTIONS = {
    "consistency": {"discretization": {"name": "fixed", "points": 4}, "sigma_min": 0.0},
    "continuous_consistency": {},
    "gan": {},
    "latent_consistency": {"teacher": "eps", "schedule": {"name": "vp", "num_steps": 1000}},
    "mean_flow": {},
    "progressive_distillation": {"teacher": "v", "start_steps": 4, "round_steps": 1, "schedule": "trig"},
    "reflow": {"teacher": "velocity", "round_steps": 2, "pool": 8, "every": 1, "ode_steps": 2, "schedule": "flow"},
    "shortcut": {},
}
# Objectives with options that are off by default.
VARIANTS = {
    "denoising with options": {"name": "denoising", "learned_weight": True, "offset_noise": 0.1, "pyramid_noise": 0.5,
                               "input_perturbation": 0.1},
    "contrastive flow_matching": {"name": "flow_matching", "contrastive": 0.05},
}  # fmt: skip
# Objectives with a state, or with networks that follow the student.
STATEFUL = ("consistency", "denoising", "progressive_distillation", "reflow")
SCALAR_CONDITIONS = ("mean_flow", "shortcut", "latent_consistency")  # objectives whose networks need them
PURE_NOISE = ("flow", "trig", "laplace", "shifted")  # schedules whose SNR at t = 1 is 0


def refusal(objective, parameterization, schedule):
    """Returns the field that the error for an invalid combination names, or None for a valid combination."""
    if (objective == "vdm") != (schedule == "learned"):
        return "objective.schedule.name"
    if schedule in PURE_NOISE and parameterization in ("eps", "score"):
        return "objective.parameterization"
    if objective == "vdm" and parameterization == "velocity":
        return "objective.parameterization.name"
    if objective == "consistency" and parameterization == "x0":  # x0 is not x at t = 0
        return "objective.parameterization"
    if objective == "consistency" and parameterization == "velocity" and schedule in ("ve", "vp_sde"):
        return "objective.parameterization"  # the velocity is infinite at t = 0
    return None


SGD = optimizer.make_optimizer(steps=3, name="sgd", learning_rate=1e-4)
OPTIMIZER = dataclasses.replace(SGD, transform=SGD.transform._replace(update=jax.jit(SGD.transform.update)))
# An autoencoder has nothing to sample; `objectives/test_autoencoder.py` trains every network that is one.
OBJECTIVES, SMALLEST = [name for name in names("objectives") if name != "autoencoder"], "mlp"
# Networks that are autoencoders refuse to be called as denoisers; `encoders/test_autoencoder_folders.py` tests them.
NETWORKS = [name for name in names("networks") if not name.startswith("autoencoder_")]


def combinations():
    """Yields tuples of objective, network, parameterization and schedule."""
    paths = [name for name in OBJECTIVES if name not in OPTIONS or name == "consistency"]
    for objective, parameterization, schedule in itertools.product(
        paths, names("parameterization"), names("schedules")
    ):
        if objective != "consistency" or parameterization == "v" or schedule == "edm":
            yield objective, SMALLEST, parameterization, schedule
    yield from ((variant, SMALLEST, "x0", "trig") for variant in VARIANTS)
    all_networks = itertools.cycle(NETWORKS)
    for objective in OBJECTIVES:
        # Of the few-step methods, mean_flow tests every network in forward mode; the others take two more in turn.
        few = objective in OPTIONS and objective != "mean_flow"
        parts = (None, None) if objective in OPTIONS else ("x0", "learned" if objective == "vdm" else "trig")
        for network in (SMALLEST, *itertools.islice(all_networks, 2)) if few else NETWORKS:
            yield objective, network, *parts


@pytest.fixture(scope="module")
def network_of(digits, mesh_of):
    """Returns a function that builds a network by name, with or without scalar conditions. Its forward pass is compiled
    once for all tests, and none of its parameters is 0."""

    @functools.cache
    def make(name, has_scalars):
        spec = {
            "name": name,
            **TINY.get(name, {}),
            "scalar_conditions": ("step_size", "guidance_scale") if has_scalars else (),
        }
        network = build("networks", spec, shape=digits.spec.shape, num_classes=10)
        waves = lambda leaf: 0.01 * np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape)  # noqa: E731
        params = jax.tree.map(lambda leaf: leaf + waves(leaf), jax.jit(network.init)(jax.random.key(0)))
        compiled = jax.jit(network.apply)

        def apply(*args, **kwargs):
            with jax.disable_jit(False):  # compiled even where the caller is not
                return compiled(*args, **kwargs)

        project = network.project and jax.jit(network.project)
        return dataclasses.replace(network, init=lambda key: params, apply=apply, project=project)

    return make


def spec_of(objective, parameterization, schedule, network, data):
    """Returns the spec of an objective, with a teacher if it needs one."""
    options = {"name": objective, **OPTIONS.get(objective, {}), **VARIANTS.get(objective, {})}
    if parameterization is not None:
        options |= {"schedule": schedule, "parameterization": {"name": parameterization, "c_noise": "time"}}
        options["time_sampler"] = "uniform"
    if "teacher" in options:
        theirs = {"name": "denoising", "schedule": options["schedule"], "parameterization": options["teacher"]}
        options["parameterization"] = options["teacher"]
        options["teacher"] = Teacher(network, build("objectives", theirs), data, 0.1)
    return options


def is_quick(combination):
    objective, network, parameterization, schedule = combination
    if refusal(objective, parameterization, schedule):
        return True
    if not of_networks(parameterization, schedule):
        return False
    if objective == "denoising":
        return network in ("mlp", "dit")
    return network == SMALLEST and objective not in STATEFUL


def of_networks(parameterization, schedule):
    """Returns whether a combination is one that tests networks, and not parameterizations and schedules."""
    return (parameterization, schedule) in ((None, None), ("x0", "trig"), ("x0", "learned"))


@pytest.mark.parametrize(
    ("objective", "network", "parameterization", "schedule"),
    slow_except(is_quick, sorted(set(combinations()), key=str)),
)
def test_trains_and_samples_or_is_rejected(
    objective, network, parameterization, schedule, network_of, digits, digits_batch, mesh_of
):
    network = network_of(network, objective in SCALAR_CONDITIONS)
    spec = spec_of(objective, parameterization, schedule, network, digits.spec)
    field = refusal(objective, parameterization, schedule)
    if field:
        with refused(field):
            build("objectives", spec, field="objective")
        return

    objective = build("objectives", spec, field="objective")
    mesh = mesh_of(2, 1, 1)
    opt, averages = OPTIMIZER, ema.make_ema(decays=(0.5,))
    state = init_state(objective, network, opt, averages, jax.random.key(0))
    batch = jax.tree.map(lambda x: np.asarray(x[:4]), digits_batch)
    places = sharding.of_state(state, mesh)
    state = jax.device_put(state, places)
    batch = sharding.to_global(batch, sharding.by_example(mesh))
    before = jax.device_get(jax.tree.leaves(state.params["net"]))
    step = make_step(objective, network, opt, averages, seed=0, cond_drop_rate=0.5)
    if of_networks(parameterization, schedule):
        # The others are not jitted, because hundreds of combinations would take an hour to compile.
        step = jax.jit(step, out_shardings=(places, None))
    for _ in range(3):
        state, metrics = step(state, batch)
        assert np.isfinite(metrics["loss"])
    after = jax.device_get(jax.tree.leaves(state.params["net"]))
    assert any((a != b).any() for a, b in zip(before, after, strict=True))

    params = averaged(state, "0.5")
    cond = {"label": jax.device_put(jnp.arange(2), sharding.by_example(mesh))}
    denoise = bind(objective.denoiser(network.apply, params), cond)
    path = objective.schedule_for(params)
    times = jnp.array([1.0, 0.5, 0.0])
    keys = jax.random.split(jax.random.key(0), 2)
    with jax.disable_jit():
        x = prior(path, times[0], keys, (8, 8, 1))
        kind = jax.eval_shape(denoise, x, times[0]).kind
        sampler = build("samplers", "consistency" if kind == "consistency" else "ddim")
        x = sample(denoise, path, sampler, x, times, keys)
    assert x.shape == (2, 8, 8, 1) and np.isfinite(x).all()
