"""Keys for parameters are those of `nnx.Rngs`, whatever the stream is called."""

import copy

import jax
import numpy as np
from flax import nnx

from diffusion.layers.keys import Keys


def test_keys_are_those_of_nnx_rngs():
    def draw(rngs):
        return [jax.random.key_data(key) for key in (rngs.params(), rngs.dropout(), rngs["noise"](), rngs(), rngs.a())]

    key = jax.random.key(3)
    np.testing.assert_array_equal(draw(Keys(key)), draw(nnx.Rngs(key)))


def test_keys_can_be_copied():
    keys = Keys(jax.random.key(3))
    keys.params()
    assert copy.deepcopy(keys).count == 1
