"""Encodes the text among the conditions of a batch, and drops the output of single encoders."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.core.arrays import expand
from diffusion.core.types import NULL, Apply, Array, Cond, Network, Params, Perturbation, Text, TextEncoder, TextPart

TEXT = "text"  # the name of the condition
OWN = "text_encoder"  # the key of the parameters of a trained encoder next to those of the network


def attached(network: Network, encoder: TextEncoder | None) -> Network:
    """Returns a network with an encoder that is trained with it, or the network itself for another one."""
    return network if encoder is None or encoder.attach is None else encoder.attach(network)


def attach(
    network: Network,
    init: Callable[[Array], Params],
    encode: Callable[[Params, Any], Text],
    null: Callable[[Params], Text] | None = None,
) -> Network:
    """Returns a network that encodes integer tokens itself, with the parameters `text_encoder` next to its own.

    Args:
      network: A network that is conditioned on vectors.
      init: Returns the parameters of the encoder.
      encode: Returns the vectors of what `TextEncoder.tokenize` returns.
      null: Returns the text `[1, ...]` in place of a dropped one, if `cond["null"]` has none. None: the network has a
        learned one.
    """

    def own(params: Params) -> Params:
        return {name: value for name, value in params.items() if name != OWN}

    def prepare(params: Params, cond: Cond) -> Cond:
        def encoded(values: Cond) -> Cond:
            if TEXT not in values or is_vectors(values[TEXT]):
                return values
            return {**values, TEXT: encode(params[OWN], values[TEXT])}

        cond = {**encoded(cond), NULL: encoded(cond[NULL])} if NULL in cond else encoded(cond)
        if null is None or TEXT not in cond or TEXT in cond.get(NULL, {}):
            return cond
        return {**cond, NULL: {**cond.get(NULL, {}), TEXT: _repeated(null(params[OWN]), len(cond[TEXT].tokens))}}

    def reading(apply: Apply) -> Apply:
        def apply_to_text(params: Params, x: Array, c_noise: Array, cond: Cond, *, key: Array | None = None) -> Array:
            return apply(own(params), x, c_noise, prepare(params, cond), key=key)

        return apply_to_text

    def perturbed(perturbation: Perturbation) -> Apply:
        return reading(network.perturbed(perturbation))

    def init_both(key: Array) -> Params:
        key, key_text = jax.random.split(key)
        return {**network.init(key), OWN: init(key_text)}

    return dataclasses.replace(
        network, init=init_both, apply=reading(network.apply), prepare=prepare,
        project=network.project and (lambda params: {**network.project(own(params)), OWN: params[OWN]}),
        perturbed=network.perturbed and perturbed,
    )  # fmt: skip


def _repeated(text: Text, batch: int) -> Text:
    return jax.tree.map(lambda value: jnp.broadcast_to(value, (batch, *value.shape[1:])), text)


def is_vectors(value: object) -> bool:
    """Returns whether a text has been encoded: its tokens are vectors."""
    return isinstance(value, Text) and jnp.issubdtype(value.tokens.dtype, jnp.floating)


def encoded(
    encoder: TextEncoder | None, params: Params, null: Text | None, cond: Cond, keep: Mapping[str, Array] | None = None
) -> Cond:
    """Returns conditions whose text, and that in `cond["null"]`, are vectors, unless the network encodes it.

    Args:
      encoder: The encoder, or None.
      params: Its parameters.
      null: `[1, ...]`, the text in place of a dropped one, used if `cond["null"]` has none.
      cond: The conditions. Their `text` is what `encoder.tokenize` returns, or encoded already.
      keep: Bool `[B]` by the names of `encoder.parts`: where the output of that encoder is kept.
    """
    if encoder is None or encoder.encode is None or TEXT not in cond:
        return cond
    text, nulls = cond[TEXT], dict(cond.get(NULL, {}))
    if not is_vectors(text):
        text = encoder.encode(params, text)
    if TEXT in nulls and not is_vectors(nulls[TEXT]):
        nulls[TEXT] = (encoder.encode_null or encoder.encode)(params, nulls[TEXT])
    elif TEXT not in nulls and null is not None:
        nulls[TEXT] = _repeated(null, len(text.tokens))
    for name, is_kept in (keep or {}).items():
        text = without(text, nulls[TEXT], encoder.parts[name], is_kept)
    return {**cond, TEXT: text, NULL: nulls} if nulls else {**cond, TEXT: text}


def without(text: Text, null: Text, part: TextPart, keep: Array) -> Text:
    """Returns a text in which the output of one encoder is that of the null text where it is not kept, `[B]`."""

    def replaced(value: Array, other: Array, *ranges: tuple[int, int]) -> Array:
        inside = np.ones(value.shape[1:], bool)
        for axis, (start, stop) in enumerate(ranges):
            along = (np.arange(value.shape[1 + axis]) >= start) & (np.arange(value.shape[1 + axis]) < stop)
            inside &= along.reshape((-1,) + (1,) * (value.ndim - 2 - axis))
        return jnp.where(inside & ~expand(keep, value), other.astype(value.dtype), value)

    return Text(
        replaced(text.tokens, null.tokens, part.tokens, part.features),
        replaced(text.mask, null.mask, part.tokens),
        None if text.pooled is None else replaced(text.pooled, null.pooled, part.pooled),
    )
