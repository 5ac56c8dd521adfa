"""What a network is given is held against what it was built for, and the error names the axis."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import InputError

GOOD = {"x": np.zeros((3, 8, 8, 1), np.float32), "c_noise": np.zeros(3, np.float32), "label": np.zeros(3, np.int32)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((3, 8, 5, 1), np.float32)}, "network.x: is 8 x 5; this network wants multiples of 2"),
        ({"x": np.zeros((3, 1, 8, 8), np.float32)},
         "network.x: is float32[3, 1, 8, 8], not Float[batch height width channels=1]: "
         "axis 3 (channels) is 8 and must be 1"),
        ({"x": np.zeros((8, 8, 1), np.float32)}, "network.x: is float32[8, 8, 1], not Float"),
        ({"x": np.zeros((3, 8, 8, 1), np.uint8)}, "network.x: is uint8[3, 8, 8, 1], not Float"),
        ({"c_noise": np.zeros(2, np.float32)},
         "network.c_noise: is float32[2], not Real[batch]: axis 0 (batch) is 2 and must be 3"),
        ({"c_noise": np.zeros((), np.float32)}, "network.c_noise: is float32[], not Real[batch]"),
        ({"label": np.zeros(3, np.float32)}, "network.label: is float32[3], not Integer[batch]"),
        ({"label": 3}, "network.label: is int32[], not Integer[batch]"),
        ({"keep": np.zeros(3, np.int32)}, "network.keep: is int32[3], not Bool[batch]"),
        ({"text": np.zeros((3, 4, 2), np.float32), "text_mask": np.ones((3, 5), bool)},
         "network.text_mask: is bool[3, 5], not Bool[batch tokens]: axis 1 (tokens) is 5 and must be 4"),
        ({"pose": np.zeros((2, 7), np.float32)}, "network.pose: is float32[2, 7], not Shaped[batch ...]"),
    ],
)  # fmt: skip
def test_a_wrong_input_is_named(change, message, tiny_unet):
    given = {**GOOD, **change}
    cond = {name: value for name, value in given.items() if name not in ("x", "c_noise")}
    params = jax.eval_shape(tiny_unet.init, jax.random.key(0))
    with pytest.raises(InputError, match=re.escape(message)):
        jax.eval_shape(tiny_unet.apply, params, *(jnp.asarray(given[n]) for n in ("x", "c_noise")), cond)


def test_a_network_of_one_size_takes_no_other():
    dit = build("networks", {"name": "dit", "patch_size": 2, "width": 8, "depth": 1, "num_heads": 2}, shape=(8, 8, 1))
    params = jax.eval_shape(dit.init, jax.random.key(0))
    message = "not Float[batch height=8 width=8 channels=1]: axis 2 (width) is 4 and must be 8"
    with pytest.raises(InputError, match=re.escape(message)):
        jax.eval_shape(dit.apply, params, np.zeros((3, 8, 4, 1), np.float32), GOOD["c_noise"], {})


def test_a_network_of_other_sizes_answers_in_them(tiny_unet):
    params = jax.eval_shape(tiny_unet.init, jax.random.key(0))
    x = np.zeros((3, 6, 12, 1), np.float32)
    assert jax.eval_shape(tiny_unet.apply, params, x, GOOD["c_noise"], {"label": GOOD["label"]}).shape == x.shape


def test_what_is_right_passes(tiny_unet):
    params = jax.eval_shape(tiny_unet.init, jax.random.key(0))
    cond = {"label": GOOD["label"], "keep": np.ones(3, bool), "pose": np.zeros((3, 7))}
    assert jax.eval_shape(tiny_unet.apply, params, GOOD["x"], GOOD["c_noise"], cond).shape == (3, 8, 8, 1)
    # Of another batch: nothing is remembered.
    cond = {"label": np.zeros(5, np.int32)}
    x, c_noise = np.zeros((5, 8, 8, 1), np.float32), np.zeros(5, np.float32)
    assert jax.eval_shape(tiny_unet.apply, params, x, c_noise, cond).shape == (5, 8, 8, 1)
