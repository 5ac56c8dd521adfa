"""Repeated blocks as one: their parameters stacked, the pass a scan, so that depth costs no compiling."""

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import nnx

from diffusion.core.types import Array
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.keys import Keys

Remat = Literal["none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable"]


def rematerialised(function: Callable, remat: Remat, *, in_scan: bool = False) -> Callable:
    """`function` whose backward pass computes again nothing (`none`), all of it (`full`), or what a policy of
    `jax.checkpoint_policies` does not save. In the body of a scan XLA needs no barrier against undoing that."""
    if remat == "none":
        return function
    policy = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)


class Stack(nnx.Module):
    """`depth` blocks of one shape, one after the other.

    Each parameter of all blocks is one array with a leading axis of `depth`.

    Args:
      construct: builds one block from its random keys. Its call is `block(x, *own, *args) -> x` of the same shape.
      depth: how many.
      remat: of each block; see `rematerialised`.
      unroll: blocks to an iteration of the scan: more compile longer, and may run faster.
    """

    def __init__(
        self, construct: Callable[[Keys], nnx.Module], depth: int, remat: Remat, unroll: int = 1, *, rngs: Keys
    ):
        self.remat, self.unroll = remat, unroll
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: construct(Keys(jax.random.key(0)))))
        drawn = jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(construct(Keys(key)))))
        self.blocks = _as_params(drawn(jax.random.split(rngs.params(), depth)))

    def __call__(self, x: Array, *args: Any, own: tuple[Array, ...] = (), collect: bool = False) -> Any:
        """x after the last block.

        Args:
          args: what all blocks are told.
          own: what each block alone is told; arrays with a leading axis of `depth`.
          collect: return x after each block as well, in one array with a leading axis of `depth`.
        """

        def block(x: Array, params_and_own: tuple[dict[str, Any], tuple[Array, ...]]) -> tuple[Array, Array | None]:
            params, own = params_and_own
            x = constrain(nnx.merge(self.graphdef, nnx.State(params))(constrain(x), *own, *args))
            return x, x if collect else None

        block = rematerialised(block, self.remat, in_scan=True)
        stacked = nnx.to_pure_dict(nnx.state(self.blocks))
        x, every = jax.lax.scan(block, x, (stacked, own), unroll=self.unroll)
        return (x, every) if collect else x


def _as_params(tree: dict[str, Any]) -> nnx.Dict:
    return nnx.Dict({
        name: _as_params(value) if isinstance(value, dict) else nnx.Param(value) for name, value in tree.items()
    })  # fmt: skip
