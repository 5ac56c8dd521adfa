"""The random keys that a module draws its parameters with."""

import jax

from diffusion.core.types import Array


class Keys:
    """Stands for `nnx.Rngs(key)` and gives the same keys. Its count is a plain number: that of `nnx.Rngs` is a traced
    variable, and setting it takes time that grows with what was traced before, seconds for a large U-Net."""

    def __init__(self, key: Array):
        self.key, self.count = key, 0

    def params(self) -> Array:
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)
