"""The inputs of a network are checked against what it was built for, and the error names the axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
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
        ({"keep": np.zeros(3, np.int32)}, "network.keep", ""),
        ({"text": np.zeros((3, 4, 2), np.float32), "text_mask": np.ones((3, 5), bool)},
         "network.text_mask", "axis 1 (tokens)"),
        ({"pose": np.zeros((2, 7), np.float32)}, "network.pose", "axis 0 (batch)"),
        ({"step_size": np.zeros(3, np.float32)}, "network.scalar_conditions", ""),
    ],
)  # fmt: skip
def test_a_wrong_input_is_named(change, field, axis, tiny_unet):
    inputs = {**GOOD, **change}
    cond = {name: value for name, value in inputs.items() if name not in ("x", "c_noise")}
    params = jax.eval_shape(tiny_unet.init, jax.random.key(0))
    with refused(field) as caught:
        jax.eval_shape(tiny_unet.apply, params, *(jnp.asarray(inputs[n]) for n in ("x", "c_noise")), cond)
    assert axis in str(caught.value) and (axis or "axis " not in str(caught.value))


def test_a_network_of_fixed_size_refuses_other_sizes():
    dit = build("networks", {"name": "dit", "patch_size": 2, "width": 8, "depth": 1, "num_heads": 2}, shape=(8, 8, 1))
    params = jax.eval_shape(dit.init, jax.random.key(0))
    with refused("network.x") as caught:
        jax.eval_shape(dit.apply, params, np.zeros((3, 8, 4, 1), np.float32), GOOD["c_noise"], {})
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
