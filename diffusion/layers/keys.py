"""Random keys for the initialisation of a module's parameters."""

import jax

from diffusion.core.types import Array


class Keys:
    """A substitute for `flax.nnx.Rngs(key)` that draws the same keys.

    As there, `rngs.params()`, `rngs.dropout()`, `rngs["noise"]()` and `rngs()` all draw from one stream, whatever its
    name. The count is a Python number. In `nnx.Rngs` it is a traced variable, and updating that takes time that grows
    with everything traced before: seconds for a large U-Net.
    """

    def __init__(self, key: Array):
        self.key, self.count = key, 0

    def __call__(self) -> Array:
        """Returns the next key."""
        self.count += 1
        return jax.random.fold_in(self.key, self.count - 1)

    def __getattr__(self, name: str) -> "Keys":
        if name.startswith("__"):  # `copy` and `pickle` look these up
            raise AttributeError(name)
        return self

    def __getitem__(self, name: str) -> "Keys":
        return self
