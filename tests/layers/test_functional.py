"""The inputs of a network are checked against what it was built for, and the error names the axis."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from diffusion.core.build import build
from diffusion.core.types import ArraySpec, ConditionSpec, Spec, class_labels
from diffusion.layers.functional import functional
from diffusion.sampling.guidance.conditions import Noise
from tests.refusals import refused

GOOD = {"x": np.zeros((3, 8, 8, 1), np.float32), "c_noise": np.zeros(3, np.float32), "label": np.zeros(3, np.int32)}


@pytest.mark.parametrize(
    ("change", "field", "axis"),
    [
        ({"x": np.zeros((3, 8, 5, 1), np.float32)}, "network.x", ""),
        ({"x": np.zeros((3, 1, 8, 8), np.float32)}, "network.x", "axis 3 (channels)"),
        ({"x": np.zeros((8, 8, 1), np.float32)}, "network.x", ""),
        ({"x": np.zeros((3, 8, 8, 1), np.uint8)}, "network.x", ""),
        ({"c_noise": np.zeros(2, np.float32)}, "network.c_noise", "axis 0 (batch)"),
        ({"c_noise": np.zeros((), np.float32)}, "network.c_noise", ""),
        ({"label": np.zeros(3, np.float32)}, "network.label", ""),
        ({"label": 3}, "network.label", ""),
        ({"label": None}, "network.label", ""),
        ({"keep": np.zeros(3, np.int32)}, "network.keep", ""),
        ({"keep": {"label": np.zeros(2, bool)}}, "network.keep['label']", "axis 0 (batch)"),
        ({"pose": np.zeros((2, 7), np.float32)}, "network.pose", "axis 0 (batch)"),
        ({"step_size": np.zeros(3, np.float32)}, "network.scalar_conditions", ""),
    ],
)  # fmt: skip
def test_a_wrong_input_is_named(change, field, axis, tiny_unet):
    inputs = {**GOOD, **change}
    cond = {name: value for name, value in inputs.items() if name not in ("x", "c_noise") and value is not None}
    params = jax.eval_shape(tiny_unet.init, jax.random.key(0))
    with refused(field) as caught:
        jax.eval_shape(tiny_unet.apply, params, *(jnp.asarray(inputs[n]) for n in ("x", "c_noise")), cond)
    assert axis in str(caught.value) and (axis or "axis " not in str(caught.value))


@pytest.mark.parametrize("label", [-1, 10])
def test_a_label_that_is_no_class_is_refused(label, tiny_mlp, mlp_params):
    """The null class, whose row follows the others, is chosen by `keep` alone."""
    x, c_noise, apply = np.zeros((2, 8, 8, 1), np.float32), np.zeros(2, np.float32), tiny_mlp.apply
    with refused("network.label"):
        apply(mlp_params["net"], x, c_noise, {"label": jnp.array([3, label])})
    dropped = {"label": np.array([3, 9]), "keep": np.zeros(2, bool)}
    assert np.isfinite(apply(mlp_params["net"], x, c_noise, dropped)).all()


def test_a_network_that_ignores_the_noise_of_labels_is_refused():
    class Ignorant(nnx.Module):
        def __call__(self, x, c_noise, cond, key):
            return x

    network = functional(lambda rngs: Ignorant(), (2,), conditions=class_labels(3))
    inputs = np.zeros((4, 2), np.float32), np.zeros(4, np.float32)
    network.apply({}, *inputs, {"label": np.zeros(4, int)})
    with refused("network.label"):
        network.apply({}, *inputs, {"label": np.zeros(4, int), "label_noise": Noise(*np.ones((4, 4)))})


CONDITIONS = {
    "text": ConditionSpec("text", (4, 2), pooled=5),
    "words": ConditionSpec("text", (4,), vocabulary=9),
    "pose": ConditionSpec("vector", (7,)),
    "edges": ConditionSpec("image", (8, 8, 2)),
    "score": ConditionSpec("scalar"),
}


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("text", lambda text: None, "text"),
        ("text", lambda text: text.tokens, "text"),
        ("text", lambda text: dataclasses.replace(text, pooled=None), "text"),
        ("text", lambda text: dataclasses.replace(text, tokens=text.tokens[:, :3]), "text.tokens"),
        ("text", lambda text: dataclasses.replace(text, tokens=text.tokens[:, :, 0]), "text.tokens"),
        ("text", lambda text: dataclasses.replace(text, mask=text.mask.astype(float)), "text.mask"),
        ("text", lambda text: dataclasses.replace(text, pooled=text.pooled[:, :2]), "text.pooled"),
        ("words", lambda text: dataclasses.replace(text, tokens=text.tokens.astype(np.float32)), "words.tokens"),
        ("pose", lambda pose: pose[:, :6], "pose"),
        ("edges", lambda edges: edges[:, :4], "edges"),
        ("score", lambda score: score[:, None], "score"),
    ],
)
def test_a_wrong_condition_is_named(name, change, field):
    network = functional(lambda rngs: nnx.Linear(1, 1, rngs=rngs), (8, 8, 1), conditions=CONDITIONS)
    cond = Spec(ArraySpec((8, 8, 1)), CONDITIONS).zeros(3)
    changed = {**cond, name: change(cond[name])}
    if changed[name] is None:
        del changed[name]
    with refused(f"network.{field}"):
        network.apply({}, GOOD["x"], GOOD["c_noise"], changed)


def test_a_network_of_fixed_size_refuses_other_sizes():
    uvit = build("networks", {"name": "uvit", "patch_size": 2, "width": 8, "depth": 3, "num_heads": 2}, shape=(8, 8, 1))
    params = jax.eval_shape(uvit.init, jax.random.key(0))
    with refused("network.x") as caught:
        jax.eval_shape(uvit.apply, params, np.zeros((3, 8, 4, 1), np.float32), GOOD["c_noise"], {})
    assert "axis 2 (width)" in str(caught.value)


def test_an_unknown_scalar_condition_is_refused():
    with refused("networks.scalar_conditions"):
        build("networks", {"name": "mlp", "width": 8, "scalar_conditions": ("r",)}, shape=(2,))


def test_a_network_of_variable_size_accepts_other_sizes(tiny_unet):
    params = jax.eval_shape(tiny_unet.init, jax.random.key(0))
    x = np.zeros((3, 6, 12, 1), np.float32)
    assert jax.eval_shape(tiny_unet.apply, params, x, GOOD["c_noise"], {"label": GOOD["label"]}).shape == x.shape


def test_valid_inputs_pass(tiny_unet):
    params = jax.eval_shape(tiny_unet.init, jax.random.key(0))
    cond = {"label": GOOD["label"], "keep": np.ones(3, bool), "pose": np.zeros((3, 7))}
    assert jax.eval_shape(tiny_unet.apply, params, GOOD["x"], GOOD["c_noise"], cond).shape == (3, 8, 8, 1)
    # Another batch size afterwards: no size is remembered between calls.
    cond = {"label": np.zeros(5, np.int32)}
    x, c_noise = np.zeros((5, 8, 8, 1), np.float32), np.zeros(5, np.float32)
    assert jax.eval_shape(tiny_unet.apply, params, x, c_noise, cond).shape == (5, 8, 8, 1)


def test_a_noise_label_per_frame_is_for_networks_that_say_so():
    class Scale(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))

        def __call__(self, x, c_noise, cond, key):
            return self.scale[...] * x

    x, shape = jnp.zeros((2, 3, 4, 4, 1)), (3, 4, 4, 1)
    for per_frame in (True, False):
        network = functional(Scale, shape, noise_per_frame=per_frame)
        params = network.init(jax.random.key(0))
        assert network.apply(params, x, jnp.zeros(2), {}).shape == x.shape
        if per_frame:
            assert network.apply(params, x, jnp.zeros((2, 3)), {}).shape == x.shape
        for wrong in [(2, 4), (3, 3), (2, 3, 1)] if per_frame else [(2, 3)]:
            with refused("network.c_noise"):
                network.apply(params, x, jnp.zeros(wrong), {})
