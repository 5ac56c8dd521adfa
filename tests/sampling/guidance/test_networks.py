"""Guidance by other models, and by the scale as an input of the network."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.arrays import expand
from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Denoised, Spec, class_labels
from diffusion.pipelines.generator import Generator, is_neutral
from diffusion.sampling.guidance import autoguidance, guidance_embedding
from tests.refusals import refused
from tests.sampling.guidance.closed_form import COND, TIMES, X, arguments_of, close

# autoguidance


def test_autoguidance_evaluates_both_models_at_the_same_arguments():
    calls = []

    def recorded(function):
        def denoise(x, t, cond):
            calls.append((x, t, cond))
            return Denoised(function(x, t, cond), log_variance=function(x, t, cond))

        return denoise

    def good(x, t, cond):
        return x * expand(t * cond["label"], x)

    def bad(x, t, cond):
        return jnp.sin(x) + expand(t + cond["label"] * cond["keep"], x)

    t, cond = TIMES[1], {**COND, "keep": np.array([True, False, True, False])}
    guided = autoguidance(recorded(good), 2.5, worse=recorded(bad))(X, t, cond)
    rows = [v.reshape(4, 1, 1) for v in (t, cond["label"], cond["keep"])]
    better, poor = X * rows[0] * rows[1], np.sin(X) + rows[0] + rows[1] * rows[2]
    close(guided.x0, poor + 2.5 * (better - poor))
    close(guided.conditional, better)
    close(guided.log_variance, better)
    for call in calls:
        assert call[0] is X and call[1] is t and call[2] is cond
    assert len(calls) == 2


# guidance_embedding


@pytest.mark.parametrize("scale", [1.0, 2.5, np.float32([0.5, 1.0, 2.0, 4.0])], ids=["1", "2.5", "per-example"])
def test_guidance_embedding_adds_only_the_scale(scale):
    """There is one evaluation, with the other arguments unchanged, for a scale of 1 too."""
    x, t, cond = arguments_of(lambda denoise: guidance_embedding(denoise, scale), {**COND, "text": X[:, 0]})
    assert x is X and t == 0.35 and cond.keys() == {"label", "text", "guidance_scale"}
    assert cond["label"] is COND["label"] and cond["guidance_scale"].dtype == np.float32
    np.testing.assert_array_equal(cond["guidance_scale"], np.broadcast_to(np.float32(scale), 4))


def generator(network, objective, cond_drop_rate, num_classes, mesh, scale):
    spec = Spec(ArraySpec((2,), "points"), class_labels(num_classes))
    return Generator(network, objective, spec, mesh, sampler={"name": "ddim", "steps": 2},
                  guidance={"name": "guidance_embedding", "scale": scale}, cond_drop_rate=cond_drop_rate)  # fmt: skip


@pytest.mark.parametrize("num_classes", [0, 3])
def test_guidance_embedding_requires_neither_classes_nor_dropped_conditions(num_classes, ddpm, mesh_of):
    """A scale of 1 is not plain sampling, because the network receives it like any other scale."""
    spec = {"name": "mlp", "width": 8, "depth": 1, "scalar_conditions": ("guidance_scale",)}
    inner = build("networks", spec, shape=(2,), num_classes=num_classes)
    conditions = []

    def apply(params, x, c_noise, cond, *, key=None):
        conditions.append(sorted(cond))
        return inner.apply(params, x, c_noise, cond, key=key)

    network = dataclasses.replace(inner, apply=apply)
    for scale in (1.0, 2.5):
        assert not is_neutral({"name": "guidance_embedding", "scale": scale})
        generator(network, ddpm, 0.0, num_classes, mesh_of(1, 1, 1), scale)
    expected = ["guidance_scale", "label"] if num_classes else ["guidance_scale"]
    assert conditions and all(names == expected for names in conditions)


def test_guidance_embedding_requires_a_network_with_the_scale_as_input(ddpm, mesh_of):
    network = build("networks", {"name": "mlp", "width": 8, "depth": 1}, shape=(2,))
    with refused("network.scalar_conditions"):
        generator(network, ddpm, 0.1, 0, mesh_of(1, 1, 1), 1.0)
