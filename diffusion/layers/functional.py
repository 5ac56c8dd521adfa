"""From NNX modules to pure functions: the only place that splits and merges them."""

from collections.abc import Callable

from flax import nnx

from diffusion.types import Array, Cond, Network, Params


def functional(
    construct: Callable[[nnx.Rngs], nnx.Module],
    outputs: int = 1,
    *,
    project: Callable[[Params], Params] | None = None,
) -> Network:
    """Splits a module once.

    Args:
      construct: builds the module from its random streams. Its call is `module(x, c_noise, cond, key)`; its state must
        be parameters alone, with string keys (`nnx.Dict`, not lists).
      outputs, project: see `Network`.
    """
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: construct(nnx.Rngs(0))))

    def init(key: Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(construct(nnx.Rngs(key))))
        return params if project is None else project(params)

    def apply(params: Params, x: Array, c_noise: Array, cond: Cond, *, key: Array | None = None) -> Array:
        return nnx.merge(graphdef, nnx.State(params))(x, c_noise, cond, key)

    return Network(init, apply, outputs, project)
