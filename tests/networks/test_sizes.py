"""Images that are not square, and networks that take several sizes."""

import jax
import numpy as np
import pytest

from diffusion.core.build import build

UNET = {"width": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (2,), "head_dim": 4}
NETWORKS = {
    "unet": {"name": "unet", **UNET},
    "edm2": {"name": "edm2", **UNET},
    "unet_text": {"name": "unet_text", "width": 4, "channel_mult": (1, 2), "num_res_blocks": 1, "depth": (0, 1),
                  "num_heads": 2},
    "dit": {"name": "dit", "width": 8, "depth": 1, "num_heads": 2},
    "dit with rope": {"name": "dit", "width": 8, "depth": 1, "num_heads": 2, "positions": "rope"},
    "uvit": {"name": "uvit", "width": 8, "depth": 3, "num_heads": 2, "conv": False},
}  # fmt: skip
RNG = np.random.default_rng(0)
C_NOISE = np.float32([10, 700])


def network_of(name, shape):
    """Returns a network, and parameters of which none is zero."""
    network, rng = build("networks", NETWORKS[name], shape=shape), np.random.default_rng(1)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return network, jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.mark.parametrize("name", ["unet", "unet_text", "edm2", "dit", "dit with rope"])
def test_a_network_takes_every_size(name):
    """Its size is that of x. The shape that it was built for has no effect, except on the levels with attention."""
    programs = []
    for shape in ((8, 4, 1), (4, 8, 1), (4, 4, 1)):
        network, params = network_of(name, shape)
        program, out = jax.make_jaxpr(network.apply, return_shape=True)(params, np.zeros((2, 8, 4, 1)), C_NOISE, {})
        programs.append((str(program.jaxpr), [const.tolist() for const in program.consts]))
        assert out.shape == (2, 8, 4, 1)
        assert jax.eval_shape(network.apply, params, np.zeros((2, 4, 8, 1)), C_NOISE, {}).shape == (2, 4, 8, 1)
    assert programs[0] == programs[1] == programs[2]


@pytest.mark.parametrize("name", ["dit", "dit with rope", "uvit"])
def test_patches_are_squares_of_the_image(name):
    """With blocks that do nothing, a change of one patch affects only that patch."""
    network, params = network_of(name, (8, 4, 1))
    zeros = {key: jax.tree.map(np.zeros_like, params[key]) for key in params if key.endswith("blocks")}
    if name == "uvit":  # its second half starts with a map of the tokens and those of the first half
        kernel = zeros["out_blocks"]["blocks"]["skip"]["kernel"]
        kernel[:] = np.concatenate([np.eye(8), 0 * np.eye(8)])
    params = {**params, **zeros}
    x = RNG.normal(size=(2, 8, 4, 1)).astype(np.float32)
    changed = x.copy()
    changed[:, 4:6, 2:4] += 1
    difference = abs(network.apply(params, changed, C_NOISE, {}) - network.apply(params, x, C_NOISE, {})).max((0, 3))
    expected = np.zeros((8, 4), bool)
    expected[4:6, 2:4] = True
    np.testing.assert_array_equal(difference > 0, expected)
