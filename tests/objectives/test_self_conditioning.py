"""Self-conditioning (Chen et al. 2022, arXiv 2208.04202): the network reads an earlier estimate of x0."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Denoised, Network, Spec, class_labels
from diffusion.pipelines.generator import Generator
from diffusion.sampling.loop import sample
from tests.objectives.drawing import with_draws
from tests.refusals import refused
from tests.tiers import slow_except


def linear(params, x, c_noise, cond, *, key=None):
    return params["w"] * x + params["v"] * cond.get("previous_x0", 0 * x)


def objective_of(name, **options):
    return build("objectives", {"name": name, "parameterization": "v", "self_conditioning": True, **options})


@pytest.mark.parametrize("name", slow_except(["flow_matching"], ["denoising", "flow_matching"]))
def test_training_matches_a_manual_computation(name, x64):
    """Algorithm 1: half of the examples see the estimate that the network makes without one, without a gradient."""
    objective, w, v = objective_of(name), 0.7, -0.4
    batch = with_draws(objective, {"x": jax.random.normal(jax.random.key(0), (40, 3), float), "cond": {}},
                       jax.random.key(1))  # fmt: skip
    draws = batch["draws"]
    t, eps, seen = (np.asarray(draws[key]) for key in ("t", "eps", "self_conditioned"))
    assert 10 < seen.sum() < 30
    alpha, sigma = (np.asarray(of(t))[:, None] for of in (objective.schedule.alpha, objective.schedule.sigma))
    x = alpha * batch["x"] + sigma * eps
    power = alpha**2 + sigma**2
    estimate = (alpha * x - sigma * w * x) / power * seen[:, None]
    error = w * x + v * estimate - (alpha * eps - sigma * batch["x"])

    @jax.jit
    def loss(w, v):
        return objective.loss(linear, {"net": {"w": w, "v": v}}, {}, batch, None, 0)[0]

    np.testing.assert_allclose(loss(w, v), (error**2).mean(1), rtol=1e-10)
    of_w, of_v = jax.jit(jax.jacobian(loss, argnums=(0, 1)))(w, v)
    np.testing.assert_allclose(of_w, (2 * error * x).mean(1), rtol=1e-10)
    np.testing.assert_allclose(of_v, (2 * error * estimate).mean(1), rtol=1e-10)


def test_the_estimate_is_that_of_the_first_output():
    objective = objective_of("denoising", learned_variance=True)
    seen = []

    def two(params, x, c_noise, cond, *, key=None):
        seen.append(cond.get("previous_x0", x).shape)
        return jnp.concatenate([x, 0 * x], axis=-1)

    def loss(x):
        batch = with_draws(objective, {"x": x, "cond": {}}, jax.random.key(1))
        return objective.loss(two, {"net": {}}, {}, batch, None, 0)[0]

    jax.eval_shape(loss, jnp.ones((4, 2, 2, 1)))
    assert seen == [(4, 2, 2, 1)] * 2


def test_it_draws_what_is_drawn_without_it():
    x = {"x": jnp.ones((4, 3)), "cond": {}}
    plain, drawn = (with_draws(objective_of("flow_matching", self_conditioning=on), x, jax.random.key(1))["draws"]
                    for on in (False, True))  # fmt: skip
    assert drawn.keys() - plain.keys() == {"self_conditioned"}
    jax.tree.map(np.testing.assert_array_equal, plain, {key: drawn[key] for key in plain})


@pytest.mark.parametrize("name", slow_except(["ddim"], ["ddim", "heun"]))
def test_sampling_passes_the_x0_of_the_last_step(name):
    """A step sees the x0 that the denoiser gave at the start of the step before, and the first step sees 0."""
    schedule, sampler, times = build("schedules", "flow"), build("samplers", name), jnp.array([1.0, 0.8, 0.5, 0.2, 0.0])

    def denoise(x, t, previous_x0):
        return Denoised(0.3 * x + 0.5 * previous_x0 + 0.1)

    def draw(denoise, x, times, **options):
        return sample(denoise, schedule, sampler, x, times, jax.random.key(0), **options)

    start = jnp.array([[1.0, -2.0]])
    path = draw(denoise, start, times, self_conditioning=True, trajectory=True)
    x, previous = start, jnp.zeros_like(start)
    for index in range(4):
        fixed = lambda x, t, previous=previous: denoise(x, t, previous)  # noqa: E731
        previous, x = fixed(x, times[index]).x0, draw(fixed, x, times[index : index + 2])
        np.testing.assert_allclose(path[index + 1], x, rtol=1e-5)
    without = draw(lambda x, t: denoise(x, t, 0), start, times, trajectory=True)
    np.testing.assert_allclose(path[1], without[1], rtol=1e-6)
    assert abs(path[2] - without[2]).max() > 0.05


@pytest.mark.slow
def test_a_generator_passes_it_through_guidance(mesh_of):
    objective = objective_of("flow_matching")
    spec = Spec(ArraySpec((4, 4, 1)), class_labels(3))
    network = build("networks", {"name": "dit", "width": 8, "depth": 1, "num_heads": 2, "self_conditioning": True},
                    shape=spec.shape, num_classes=3)  # fmt: skip
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = {"net": jax.tree.map(lambda leaf: 0.3 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), shapes)}

    def drawn(objective, steps):
        read = dataclasses.replace(network, self_conditioning=objective.self_conditioning)
        generator = Generator(read, objective, spec, mesh_of(1, 1, 1), sampler={"name": "ddim", "steps": steps},
                              guidance={"name": "cfg", "scale": 2.0}, cond_drop_rate=0.1)  # fmt: skip
        return generator(params, {"label": np.array([0, 2])}, 2, seed=0)

    off = dataclasses.replace(objective, self_conditioning=False)
    np.testing.assert_allclose(drawn(objective, 1), drawn(off, 1), rtol=1e-5)
    assert abs(drawn(objective, 2) - drawn(off, 2)).max() > 1e-3


def test_the_network_must_read_it():
    with refused("network.self_conditioning"):
        objective_of("denoising").init(Network(lambda key: {}, linear), jax.random.key(0))
    with refused("network.self_conditioning"):
        other = build("objectives", "denoising")
        other.init(Network(lambda key: {}, linear, self_conditioning=True), jax.random.key(0))


def test_the_network_must_know_x0_at_t_1():
    for name, schedule in (("eps", "vp"), ("score", "vp"), ("eps", "flow")):
        with refused("objectives.parameterization"):
            build("objectives", {"name": "denoising", "self_conditioning": True, "parameterization": name,
                                 "schedule": schedule})  # fmt: skip
