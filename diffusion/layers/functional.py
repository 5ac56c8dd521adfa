"""Converts NNX modules to pure functions, and checks the inputs of a network against what it was built for.

This is the only module that splits and merges NNX modules of networks.
"""

from collections.abc import Callable

import jax
import numpy as np
from beartype.door import is_bearable
from flax import nnx
from jaxtyping import Bool, Float, Integer, Real, Shaped, jaxtyped

from diffusion.core.types import Array, Cond, InputError, Network, Params
from diffusion.layers.keys import Keys

AnyArray = Array | np.ndarray
# Names of the axes of one example, by their number.
AXES = {3: ("height", "width", "channels"), 4: ("frames", "height", "width", "channels")}
SCALAR_CONDITIONS = ("step_size", "guidance_scale")
# Kinds and axes of the known conditions.
CONDITIONS = {
    "label": (Integer, "batch"),
    "keep": (Bool, "batch"),
    **dict.fromkeys(SCALAR_CONDITIONS, (Float, "batch")),
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
    """Returns the network of an NNX module.

    Args:
      construct: Builds the module from its random keys. The module is called as `module(x, c_noise, cond, key)`. Its
        state must consist of parameters only, with string keys (`nnx.Dict`, not lists).
      shape: The shape of one example.
      multiple: If given, heights and widths other than those of `shape` are allowed if they are multiples of this.
      outputs, scalar_conditions, project: See `Network`.

    Returns:
      A network whose `apply` raises InputError for an input of the wrong dtype or shape, naming the axis.

    Raises:
      InputError: for an unknown name in `scalar_conditions`.
    """
    for name in scalar_conditions:
        if name not in SCALAR_CONDITIONS:
            raise InputError("scalar_conditions", f"must be among {', '.join(SCALAR_CONDITIONS)}, got {name!r}")
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: construct(Keys(jax.random.key(0)))))
    names = AXES.get(len(shape), [f"axis{number}" for number in range(1, len(shape) + 1)])
    free = () if multiple is None else ("height", "width")
    axes = (name if name in free else f"{name}={size}" for name, size in zip(names, shape, strict=True))
    example = " ".join(["batch", *axes])

    def init(key: Array) -> Params:
        params = nnx.to_pure_dict(nnx.state(construct(Keys(key))))
        return params if project is None else project(params)

    def apply(params: Params, x: Array, c_noise: Array, cond: Cond, *, key: Array | None = None) -> Array:
        for name in SCALAR_CONDITIONS:
            if name in cond and name not in scalar_conditions:
                raise InputError("network.scalar_conditions", f"the objective, sampler or guidance conditions on "
                                 f"{name!r}; train a network with {name!r} in scalar_conditions")  # fmt: skip
        expected = {name: CONDITIONS.get(name, (Shaped, "batch ...")) for name in cond}
        check({"x": x, "c_noise": c_noise, **cond}, {"x": (Float, example), "c_noise": (Real, "batch"), **expected})
        if multiple and (x.shape[-3] % multiple or x.shape[-2] % multiple):
            size = f"{x.shape[-3]} x {x.shape[-2]}"
            raise InputError("network.x", f"height and width must be multiples of {multiple}, got {size}")
        return nnx.merge(graphdef, nnx.State(params))(x, c_noise, cond, key)

    return Network(init, apply, outputs, project, scalar_conditions)


def check(arrays: dict[str, Array], expected: dict[str, tuple[type, str]]) -> None:
    """Checks arrays against their kinds and axes. Axes of the same name must have the same size.

    Args:
      arrays: The arrays by name.
      expected: For each name a kind of `jaxtyping`, such as `Float`, and the axes, such as `"batch height=8"`.

    Raises:
      InputError: naming the array, and the axis if its size is wrong.
    """
    sizes: dict[str, int] = {}  # of the axes of the arrays already checked
    with jaxtyped("context"):
        for name, array in arrays.items():
            kind, axes = expected[name]
            if not is_bearable(array, kind[AnyArray, axes]):
                shape, dtype = getattr(array, "shape", None), getattr(array, "dtype", type(array).__name__)
                problem = f"must be {kind.__name__}[{axes}], got {dtype}{list(shape or ())}"
                raise InputError(f"network.{name}", problem + _wrong_axis(shape, axes.split(), sizes))
            sizes |= zip((axis.partition("=")[0] for axis in axes.split()), array.shape, strict=False)


def _wrong_axis(shape: tuple[int, ...] | None, axes: list[str], sizes: dict[str, int]) -> str:
    """Describes the first axis whose size is wrong; empty if the number of axes is wrong."""
    if shape is None or len(shape) != len(axes):
        return ""
    for number, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        name, _, fixed = axis.partition("=")
        right = int(fixed) if fixed else sizes.get(name, size)
        if size != right:
            return f"; axis {number} ({name}) must be {right}, got {size}"
    return ""
