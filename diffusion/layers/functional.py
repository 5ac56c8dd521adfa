"""Converts NNX modules to pure functions, and checks the inputs of a network against what it was built for.

This is the only module that splits and merges NNX modules of networks.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from beartype.door import is_bearable
from flax import nnx
from jaxtyping import Bool, Float, Integer, Real, Shaped, jaxtyped

from diffusion.core import checks
from diffusion.core.arrays import with_null
from diffusion.core.types import (
    LABEL_NOISE,
    PREVIOUS_X0,
    SCALAR_CONDITIONS,
    Apply,
    Array,
    Cond,
    ConditionSpec,
    InputError,
    Network,
    Params,
    Perturbation,
    Text,
)
from diffusion.layers.keys import Keys

AnyArray = Array | np.ndarray
# Names of the axes of one example, by their number.
AXES = {3: ("height", "width", "channels"), 4: ("frames", "height", "width", "channels")}


class Blocks(NamedTuple):
    """The blocks of a network that a `Perturbation` may change.

    Attributes:
      num: How many there are.
      middle: The number of the one in the middle; None if there is none.
      may_skip: Whether they can be skipped.
    """

    num: int
    middle: int | None
    may_skip: bool = False


def split(construct: Callable[[Keys], nnx.Module]) -> tuple[Callable[[Array], Params], Callable[[Params], nnx.Module]]:
    """Returns the functions `init(key) -> params` and `merge(params) -> module` of an NNX module.

    A large module takes seconds to construct. It is constructed once for its structure and for all abstract calls of
    `init`, as by `jax.eval_shape`, which share a trace.

    Args:
      construct: Builds the module from its random keys. Its state must consist of parameters only, with string keys
        (`nnx.Dict`, not lists).
    """
    graphdefs = []

    def create(key: Array) -> Params:
        graphdef, state = nnx.split(construct(Keys(key)))
        graphdefs.append(graphdef)
        return nnx.to_pure_dict(state)

    traced = jax.jit(create, inline=True)
    jax.eval_shape(traced, jax.random.key(0))
    graphdef = graphdefs[0]
    return (
        lambda key: (traced if isinstance(key, jax.core.Tracer) else create)(key),
        lambda params: nnx.merge(graphdef, nnx.State(params)),
    )


def functional(
    construct: Callable[[Keys], nnx.Module],
    shape: tuple[int, ...],
    outputs: int = 1,
    *,
    multiple: int | None = None,
    conditions: Mapping[str, ConditionSpec] | None = None,
    scalar_conditions: tuple[str, ...] = (),
    project: Callable[[Params], Params] | None = None,
    noise_per_frame: bool = False,
    blocks: Blocks | None = None,
) -> Network:
    """Returns the network of an NNX module.

    Args:
      construct: Builds the module from its random keys; see `split`. The module is called as `module(x, c_noise, cond,
        key)`.
      shape: The shape of one example.
      multiple: If given, heights and widths other than those of `shape` are allowed if they are multiples of this.
      conditions: The conditions that the module reads. Only their batch axis is checked for others.
      outputs, scalar_conditions, project: See `Network`.
      noise_per_frame: Whether the module also accepts a noise label per frame, c_noise `[B, frames]`.
      blocks: The blocks that can be perturbed, if there are any. The module then also accepts a keyword `perturbation`,
        with `layers` that exist and are not empty.

    Returns:
      A network whose `apply` raises InputError for a missing condition or an input of the wrong dtype or shape, naming
      the axis, and for a label that is not a class, unless it is traced. To drop a label, use `keep`. The values in
      `cond["null"]` replace those that are not kept.

    Raises:
      InputError: for an unknown name in `scalar_conditions`.
    """
    for name in scalar_conditions:
        if name not in SCALAR_CONDITIONS:
            raise InputError("scalar_conditions", f"must be among {', '.join(SCALAR_CONDITIONS)}, got {name!r}")
    create, merge = split(construct)
    names = AXES.get(len(shape), [f"axis{number}" for number in range(1, len(shape) + 1)])
    free = () if multiple is None else ("height", "width")
    axes = [name if name in free else f"{name}={size}" for name, size in zip(names, shape, strict=True)]
    example, conditions = " ".join(["batch", *axes]), conditions or {}

    def init(key: Array) -> Params:
        params = create(key)
        return params if project is None else project(params)

    def apply(
        params: Params, x: Array, c_noise: Array, cond: Cond, *, key: Array | None = None, **more: Perturbation
    ) -> Array:
        for name in SCALAR_CONDITIONS:
            if name in cond and name not in scalar_conditions:
                raise InputError("network.scalar_conditions", f"the objective, sampler or guidance conditions on "
                                 f"{name!r}; train a network with {name!r} in scalar_conditions")  # fmt: skip
        cond = with_null(cond)
        if PREVIOUS_X0 in conditions:
            cond = {PREVIOUS_X0: jnp.zeros_like(x), **cond}
        for name in conditions:
            if name not in cond:
                raise InputError(f"network.{name}", "is missing: the network is conditioned on it")
        per_frame = noise_per_frame and np.ndim(c_noise) == 2
        arrays = {"x": x, "c_noise": c_noise}
        expected = {"x": (Float, example), "c_noise": (Real, f"batch frames={shape[0]}" if per_frame else "batch")}
        for name, value in cond.items():
            for part, array, kind_and_axes in _parts(name, value, conditions, " ".join(axes[:-1])):
                arrays[part], expected[part] = array, kind_and_axes
        check(arrays, expected)
        if "label" in conditions and _is_known(cond["label"]):
            checks.labels(cond["label"], conditions["label"].num_classes, "network.label")
        if multiple and (x.shape[-3] % multiple or x.shape[-2] % multiple):
            size = f"{x.shape[-3]} x {x.shape[-2]}"
            raise InputError("network.x", f"height and width must be multiples of {multiple}, got {size}")
        if LABEL_NOISE not in cond:
            return merge(params)(x, c_noise, cond, key, **more)
        noise, calls = cond[LABEL_NOISE], []

        def noisy(embeddings: Array) -> Array:
            calls.append(embeddings)
            return noise(embeddings)

        output = merge(params)(x, c_noise, {**cond, LABEL_NOISE: noisy}, key, **more)
        if not calls:
            raise InputError("network.label", "this network cannot add noise to its labels; leave out guidance.cads")
        return output

    def perturbed(perturbation: Perturbation) -> Apply:
        if perturbation.kind == "skip" and not blocks.may_skip:
            raise InputError("layers", "the blocks of this network cannot be skipped; use pag or seg, or dit or uvit")
        layers = perturbation.layers or (() if blocks.middle is None else (blocks.middle,))
        if not layers or min(layers) < 0 or max(layers) >= blocks.num:
            kind = "blocks" if blocks.may_skip else "blocks with self-attention"
            raise InputError("layers", f"must be among the network's {blocks.num} {kind}, numbered from 0; got "
                             f"{list(layers)}")  # fmt: skip
        return functools.partial(apply, perturbation=dataclasses.replace(perturbation, layers=layers))

    return Network(init, apply, outputs, project, scalar_conditions, perturbed=perturbed if blocks else None,
                   self_conditioning=PREVIOUS_X0 in conditions, multiple=multiple)  # fmt: skip


def _is_known(array: AnyArray) -> bool:
    """Returns whether the values of an array are known in this process while the network is called."""
    return not isinstance(array, jax.core.Tracer) and getattr(array, "is_fully_addressable", True)


def _parts(
    name: str, value: Any, conditions: Mapping[str, ConditionSpec], size: str
) -> list[tuple[str, Any, tuple[type, str]]]:
    """Returns the name, the array, and the expected kind and axes of each part of a condition.

    Args:
      size: The axes of x between its first and its last.
    """
    if name == "keep":
        if isinstance(value, Mapping):
            return [(f"keep[{key!r}]", array, (Bool, "batch")) for key, array in value.items()]
        return [(name, value, (Bool, "batch"))]
    if name in SCALAR_CONDITIONS:
        return [(name, value, (Float, "batch"))]
    spec = conditions.get(name)
    if spec is None:
        return [(name, leaf, (Shaped, "batch ...")) for leaf in jax.tree.leaves(value)]
    if spec.kind == "text":
        if not isinstance(value, Text) or (value.pooled is None) != (spec.pooled == 0):
            raise InputError(f"network.{name}", f"must be a Text with{'' if spec.pooled else 'out'} `pooled`")
        tokens = (Integer, "batch tokens={}") if spec.vocabulary else (Float, "batch tokens={} features={}")
        found = [(f"{name}.tokens", value.tokens, (tokens[0], tokens[1].format(*spec.shape))),
                 (f"{name}.mask", value.mask, (Bool, f"batch tokens={spec.shape[0]}"))]  # fmt: skip
        return found + [(f"{name}.pooled", value.pooled, (Float, f"batch pooled={spec.pooled}"))] * bool(spec.pooled)
    kind_and_axes = {
        "label": (Integer, "batch"),
        "scalar": (Float, "batch"),
        "vector": (Float, f"batch features={spec.shape[0] if spec.shape else 0}"),
        "image": (Float, f"batch {size} image_channels={spec.shape[-1] if spec.shape else 0}"),
    }
    return [(name, value, kind_and_axes[spec.kind])]


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
