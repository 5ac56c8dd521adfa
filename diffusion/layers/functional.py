"""From NNX modules to pure functions: the only place that splits and merges them, and where what a network is given is
held against what it was built for."""

from collections.abc import Callable

import jax
import numpy as np
from beartype.door import is_bearable
from flax import nnx
from jaxtyping import Bool, Float, Integer, Real, Shaped, jaxtyped

from diffusion.core.types import Array, Cond, InputError, Network, Params
from diffusion.layers.keys import Keys

Arrays = Array | np.ndarray
# The axes of one example, by their number, and of the conditions that the house knows.
AXES = {3: ("height", "width", "channels"), 4: ("frames", "height", "width", "channels")}
NUMBERS = ("step_size", "guidance_scale")
CONDITIONS = {
    "label": (Integer, "batch"),
    "keep": (Bool, "batch"),
    **dict.fromkeys(NUMBERS, (Float, "batch")),
    "text": (Float, "batch tokens features"),
    "text_mask": (Bool, "batch tokens"),
}


def functional(
    construct: Callable[[Keys], nnx.Module],
    shape: tuple[int, ...],
    outputs: int = 1,
    *,
    multiple: int | None = None,
    scalar_conditions: tuple[str, ...] = (),
    project: Callable[[Params], Params] | None = None,
) -> Network:
    """Splits a module once.

    Args:
      construct: builds the module from its random keys. Its call is `module(x, c_noise, cond, key)`; its state must
        be parameters alone, with string keys (`nnx.Dict`, not lists).
      shape: of one example.
      multiple: if given, heights and widths may be others than `shape`'s, if they are multiples of this.
      outputs, scalar_conditions, project: see `Network`.

    Its `apply` raises InputError for an input of another kind or shape, naming the axis.
    """
    for name in scalar_conditions:
        if name not in NUMBERS:
            raise InputError("scalar_conditions", f"no {name!r}; any of: {', '.join(NUMBERS)}")
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: construct(Keys(jax.random.key(0)))))
    names = AXES.get(len(shape), [f"axis{number}" for number in range(1, len(shape) + 1)])
    free = () if multiple is None else ("height", "width")
    axes = (name if name in free else f"{name}={size}" for name, size in zip(names, shape, strict=True))
    example = " ".join(["batch", *axes])

    def init(key: Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(construct(Keys(key))))
        return params if project is None else project(params)

    def apply(params: Params, x: Array, c_noise: Array, cond: Cond, *, key: Array | None = None) -> Array:
        for name in NUMBERS:
            if name in cond and name not in scalar_conditions:
                raise InputError("network.conditions", f"lacks {name!r}, which the sampler, the guidance or the "
                                 "objective tells it; train a network that has it")  # fmt: skip
        wanted = {name: CONDITIONS.get(name, (Shaped, "batch ...")) for name in cond}
        check({"x": x, "c_noise": c_noise, **cond}, {"x": (Float, example), "c_noise": (Real, "batch"), **wanted})
        if multiple and (x.shape[-3] % multiple or x.shape[-2] % multiple):
            raise InputError(
                "network.x", f"is {x.shape[-3]} x {x.shape[-2]}; this network wants multiples of {multiple}"
            )
        return nnx.merge(graphdef, nnx.State(params))(x, c_noise, cond, key)

    return Network(init, apply, outputs, project, scalar_conditions)


def check(arrays: dict[str, Array], wanted: dict[str, tuple[type, str]]) -> None:
    """Holds arrays against their kinds and axes, of which those of one name must be of one size.

    Raises:
      InputError: names the array, and the axis where it is one.
    """
    sizes: dict[str, int] = {}  # as the arrays before had them
    with jaxtyped("context"):
        for name, array in arrays.items():
            kind, axes = wanted[name]
            if not is_bearable(array, kind[Arrays, axes]):
                shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", type(array).__name__)
                problem = f"is {dtype}{list(shape or ())}, not {kind.__name__}[{axes}]"
                raise InputError(f"network.{name}", problem + _where(shape, axes.split(), sizes))
            sizes |= zip((axis.partition("=")[0] for axis in axes.split()), array.shape, strict=False)


def _where(shape: tuple[int, ...] | None, axes: list[str], sizes: dict[str, int]) -> str:
    """Which axis is of the wrong size, in words."""
    if shape is None or len(shape) != len(axes):
        return ""
    for number, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        name, _, fixed = axis.partition("=")
        right = int(fixed) if fixed else sizes.get(name, size)
        if size != right:
            return f": axis {number} ({name}) is {size} and must be {right}"
    return ""
