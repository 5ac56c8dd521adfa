"""Low-rank adaptation (LoRA; Hu et al. 2021, arXiv 2106.09685): trains low-rank changes of a network's kernels.

    W' = W + (alpha / rank) A B        A [..., in, rank], B [..., rank, out]

The adapted network is a pure function of its parameters `{"base": W, "lora": {..., "kernel": {"A": ..., "B": ...}}}`.
It merges them and applies the network, which knows nothing of it. The base is neither trained nor saved.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusion.core import checks, trees
from diffusion.core.types import Apply, Array, Cond, InputError, Network, Params, Perturbation

KERNELS = (r"kernel\d*$",)


def merge(params: Params, scale: float) -> Params:
    """Returns the parameters of the network itself, with the changes added.

    Args:
      params: The parameters of the adapted network.
      scale: alpha / rank.
    """
    return _merged(params["base"], params["lora"], scale)


def make(network: Network, rank: int = 8, alpha: float | None = None, targets: tuple[str, ...] = KERNELS) -> Network:
    """Adapts a network.

    At initialisation the adapted network is the network itself, bit for bit, because B is 0.

    Args:
      network: The network; given by the config.
      rank: The rank r of the changes.
      alpha: The changes are scaled by alpha / rank; None for alpha = rank.
      targets: Regular expressions on the paths of the parameters to adapt, such as `attention/qkv/kernel`. Leaves of
        two or more dimensions are adapted: matrices, matrices stacked along leading axes, and convolutions, whose A has
        the size of the convolution and whose B is a 1x1 convolution.

    Raises:
      InputError: No parameter with two or more dimensions matches, or a number is out of range.
    """
    checks.network_size(rank=rank, alpha=alpha)
    scale = (rank if alpha is None else alpha) / rank
    matches = trees.matcher(targets, "targets")
    shapes = {path: leaf for path, leaf in trees.by_path(jax.eval_shape(network.init, jax.random.key(0))).items()
              if leaf.ndim >= 2 and matches(path)}  # fmt: skip
    if not shapes:
        raise InputError("targets", f"match no parameter with two dimensions or more, got {targets}")

    def init(key: Array) -> Params:
        key, key_base = jax.random.split(key)
        pairs = {}
        for index, (path, leaf) in enumerate(sorted(shapes.items())):
            *outer, features_in, features_out = leaf.shape
            # The leading axes of a stack are those of separate matrices; those of a convolution belong to its input.
            stacked = outer if leaf.ndim == 3 else []
            fan_in = math.prod(leaf.shape[len(stacked) : -1])
            a = jax.random.normal(jax.random.fold_in(key, index), (*outer, features_in, rank)) / math.sqrt(fan_in)
            pairs[path] = {"A": a, "B": jnp.zeros((*stacked, rank, features_out))}
        return {"base": network.init(key_base), "lora": trees.nest(pairs)}

    def adapted(apply: Apply) -> Apply:
        def merged_apply(params: Params, x: Array, c_noise: Array, cond: Cond, *, key: Array | None = None) -> Array:
            return apply(merge(params, scale), x, c_noise, cond, key=key)

        return merged_apply

    def perturbed(perturbation: Perturbation) -> Apply:
        return adapted(network.perturbed(perturbation))

    def prepare(params: Params, cond: Cond) -> Cond:
        return network.prepare(merge(params, scale), cond)

    return dataclasses.replace(
        network, init=init, apply=adapted(network.apply), prepare=network.prepare and prepare, project=None,
        trainable=("^net/lora/",), base="base", perturbed=network.perturbed and perturbed,
    )  # fmt: skip


def _merged(base: Params, lora: Params, scale: float) -> Params:
    return {
        name: value
        if name not in lora
        else _merged(value, lora[name], scale)
        if isinstance(value, dict)
        else value + scale * (lora[name]["A"] @ lora[name]["B"])
        for name, value in base.items()
    }
