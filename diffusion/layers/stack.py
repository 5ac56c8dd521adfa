"""Repeated blocks as one `lax.scan` over stacked parameters, so that compile time does not grow with depth."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from diffusion.core.types import Array, Perturbation
from diffusion.distributed.activation_sharding import constrain
from diffusion.layers.keys import Keys

Remat = Literal["none", "full", "dots_saveable", "dots_with_no_batch_dims_saveable"]


def rematerialised(function: Callable, remat: Remat, *, in_scan: bool = False) -> Callable:
    """Returns `function` with rematerialisation: its backward pass recomputes intermediate values.

    Args:
      function: The function to differentiate.
      remat: `none` recomputes nothing and `full` everything; any other value is the name of a policy of
        `jax.checkpoint_policies`, which says what to save.
      in_scan: Whether the function is the body of a scan, where XLA needs no barrier against common subexpression
        elimination.
    """
    if remat == "none":
        return function
    policy = None if remat == "full" else getattr(jax.checkpoint_policies, remat)
    return jax.checkpoint(function, policy=policy, prevent_cse=not in_scan)


class Stack(nnx.Module):
    """`depth` blocks of identical structure, applied in sequence by a scan.

    Each parameter of all blocks is one array with a leading axis of length `depth`.

    Args:
      construct: Builds one block from its random keys. A block is called as `block(x, *per_block, *args)` and returns
        an array of the shape of x.
      depth: The number of blocks.
      remat: The rematerialisation of each block; see `rematerialised`.
      unroll: The number of blocks per iteration of the scan. Higher values take longer to compile and may run faster.
      rngs: The random keys that the blocks' parameters are drawn from.
    """

    def __init__(
        self, construct: Callable[[Keys], nnx.Module], depth: int, remat: Remat, unroll: int = 1, *, rngs: Keys
    ):
        self.depth, self.remat, self.unroll = depth, remat, unroll
        self.graphdef = nnx.graphdef(nnx.eval_shape(lambda: construct(Keys(jax.random.key(0)))))
        draw = jax.vmap(lambda key: nnx.to_pure_dict(nnx.state(construct(Keys(key)))))
        self.blocks = _as_params(draw(jax.random.split(rngs.params(), depth)))

    def __call__(
        self, x: Array, *args: Any, per_block: tuple[Any, ...] = (), collect: bool = False,
        keep: int | None = None, perturbation: Perturbation | None = None,
    ) -> Any:  # fmt: skip
        """Applies the blocks and returns x after the last one.

        Args:
          x: The input of the first block.
          args: Further inputs, the same for every block.
          per_block: Further inputs that differ between the blocks; pytrees of arrays with a leading axis of length
            `depth`.
          collect: Whether to return `(x, every_x)` instead, where `every_x` stacks x after each block along a leading
            axis of length `depth`.
          keep: The number of a block, from 0. The result is then `(x, kept)`, where `kept` is x after this block.
          perturbation: The blocks in its `layers` are skipped or receive it as the keyword `perturbation`.
        """

        are_perturbed = None
        if perturbation is not None:
            are_perturbed = jnp.array([number in perturbation.layers for number in range(self.depth)])

        def block(carry: tuple[Array, Array | None], inputs: tuple[Any, ...]) -> tuple[Any, Array | None]:
            x, kept = carry
            params, per_block, is_perturbed, is_kept = inputs
            module = nnx.merge(self.graphdef, nnx.State(params))

            def run(x: Array, **more: Perturbation) -> Array:
                return module(x, *per_block, *args, **more)

            def run_perturbed(x: Array) -> Array:
                return x if perturbation.kind == "skip" else run(x, perturbation=perturbation)

            x = constrain(x)
            x = run(x) if perturbation is None else jax.lax.cond(is_perturbed, run_perturbed, run, x)
            x = constrain(x)
            kept = None if keep is None else jnp.where(is_kept, x, kept)
            return (x, kept), x if collect else None

        block = rematerialised(block, self.remat, in_scan=True)
        stacked = nnx.to_pure_dict(nnx.state(self.blocks))
        is_kept = None if keep is None else jnp.arange(self.depth) == keep
        start = x, None if keep is None else x
        inputs = stacked, per_block, are_perturbed, is_kept
        (x, kept), every = jax.lax.scan(block, start, inputs, unroll=self.unroll)
        return (x, every) if collect else x if keep is None else (x, kept)

    def each(self, *args: Any) -> Any:
        """Returns what each block returns for the same inputs, stacked along a leading axis of length `depth`."""

        def block(params: dict[str, Any]) -> Any:
            return nnx.merge(self.graphdef, nnx.State(params))(*args)

        return jax.vmap(block)(nnx.to_pure_dict(nnx.state(self.blocks)))


def _as_params(tree: dict[str, Any]) -> nnx.Dict:
    return nnx.Dict({
        name: _as_params(value) if isinstance(value, dict) else nnx.Param(value) for name, value in tree.items()
    })  # fmt: skip
