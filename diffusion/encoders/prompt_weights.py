"""Weights of words in prompts, as two user interfaces of Stable Diffusion have them.

Neither rule has a publication; both were read in the programs that define them:

  a1111    stable-diffusion-webui. `(word)` multiplies the weight of what is inside by 1.1, `[word]` divides it by 1.1,
           and `(word:1.3)` multiplies it by 1.3; nested factors multiply, and an open bracket ends with the prompt.
           Token vectors z are multiplied by their weights w, and the mean of the embedding is restored:
               z' = w z * mean(z) / mean(w z), with means over all tokens and features of one text.
  comfyui  ComfyUI. `(word)` multiplies by 1.1; `(word:1.3)` is the weight 1.3 whatever is around it; square brackets
           and brackets without a partner are text. The embedding e of the empty prompt has the weight 0:
               z' = e + w (z - e).

Both escape brackets as in `\\(`. Both divide a prompt into pieces of equal weight and tokenize each piece alone, so a
bracket ends a word. With all weights 1, a prompt has the tokens and vectors that it has without this module. Changes of
a prompt during sampling, `[from:to:0.5]`, are not supported, and the pooled embedding is not weighted.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from diffusion.core.types import Array, InputError, Params, Text, TextEncoder
from diffusion.encoders.tokenizers import Tokenizer

Rule = Literal["a1111", "comfyui"]
FACTOR = 1.1
_PARTS = re.compile(r"\\[()\[\]\\]|:\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)


def parse(prompt: str, rule: Rule = "a1111") -> list[tuple[str, float]]:
    """Returns the pieces of a prompt and their weights; neighbours have different weights."""
    brackets = {"a1111": {"(": FACTOR, "[": 1 / FACTOR}, "comfyui": {"(": FACTOR}}
    if rule not in brackets:
        raise InputError("rule", f"must be a1111 or comfyui, got {rule!r}")
    factors = brackets[rule]
    opened: dict[str, list[int]] = {bracket: [] for bracket in factors}
    pieces: list[tuple[str, float, bool]] = []  # text, weight, whether brackets around it leave the weight as it is

    def close(bracket: str, number: str | None = None) -> None:
        start = opened[bracket].pop()
        pieces[start] = ("", 1.0, False)
        for index, (text, weight, fixed) in enumerate(pieces[start:], start):
            if not fixed:
                factor = factors[bracket] if number is None else float(number)
                pieces[index] = (text, weight * factor, rule == "comfyui" and number is not None)

    for match in _PARTS.finditer(prompt):
        part = match[0]
        if part[0] == "\\":
            is_escape = rule == "a1111" or part[1:] in ("(", ")")
            pieces.append((part[1:] if is_escape and part[1:] else part, 1.0, False))
        elif part[-1] == ")" and opened["("]:
            close("(", match[1])
        elif part == "]" and opened.get("["):
            close("[")
        else:
            if part in opened:
                opened[part].append(len(pieces))
            pieces.append((part, 1.0, False))
    if rule == "a1111":
        for bracket in opened:
            while opened[bracket]:
                close(bracket)

    merged: list[tuple[str, float]] = []
    for text, weight, _ in pieces:
        if text and merged and merged[-1][1] == weight:
            merged[-1] = (merged[-1][0] + text, weight)
        elif text:
            merged.append((text, weight))
    return merged or [("", 1.0)]


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], rule: Rule = "a1111") -> tuple[Text, np.ndarray]:
    """Returns the tokens of prompts without their brackets, as the tokenizer does, and the weights of the tokens.

    Returns:
      The tokens `[N, L]`, and float32 weights `[N, L]`, which are 1 for the start, the end and the padding.
    """
    rows, weights = [], np.ones((len(prompts), tokenizer.length), np.float32)
    for index, prompt in enumerate(prompts):
        ids = [] if tokenizer.bos is None else [tokenizer.bos]
        for text, weight in parse(prompt, rule):
            inner = tokenizer.encode(text)[0 if tokenizer.bos is None else 1 : -1]
            weights[index, len(ids) : min(len(ids) + len(inner), tokenizer.length - 1)] = weight
            ids += inner
        rows.append([*ids, tokenizer.eos])
    return tokenizer.arrange(rows), weights


def weighted(encoder: TextEncoder, rule: Rule) -> TextEncoder:
    """Returns a text encoder that reads the weights in prompts.

    Raises:
      InputError: The encoder has several tokenizers, or is trained with the network.
    """
    if encoder.encode is None or not isinstance(encoder.tokenize, Tokenizer):
        raise InputError("prompt_weights", "requires a frozen text encoder with one tokenizer; leave it out")

    def split(prompts: Sequence[str]) -> dict[str, Any]:
        tokens, weights = tokenize(encoder.tokenize, prompts, rule)
        return {"tokens": tokens, "weights": weights}

    def reading(encode: Callable[[Params, Text], Text]) -> Callable[[Params, Any], Text]:
        def encode_weighted(params: Params, prompts: Mapping[str, Any]) -> Text:
            empty = encode(params, encoder.tokenize([""])) if rule == "comfyui" else None
            return apply(encode(params, prompts["tokens"]), prompts["weights"], rule, empty)

        return encode_weighted

    null = encoder.encode_null and reading(encoder.encode_null)
    return dataclasses.replace(encoder, tokenize=split, encode=reading(encoder.encode), encode_null=null)


def apply(text: Text, weights: Array | np.ndarray, rule: Rule = "a1111", empty: Text | None = None) -> Text:
    """Returns an encoded text with weighted tokens.

    Args:
      text: The output of a text encoder, of tokens `[B, L, D]`.
      weights: Weights `[B, L]`.
      rule: See the module.
      empty: The encoded empty prompt, of tokens `[1 or B, L, D]`, which `comfyui` needs.

    Raises:
      InputError: `comfyui` without `empty`.
    """
    tokens, weight = text.tokens, jnp.asarray(weights, text.tokens.dtype)[..., None]
    if rule == "a1111":
        weighted = tokens * weight
        before, after = (x.astype(jnp.float32).mean((-2, -1), keepdims=True) for x in (tokens, weighted))
        weighted *= jnp.where(after == 0, 1, before / after).astype(tokens.dtype)  # all vectors may be 0
    elif empty is None:
        raise InputError("empty", "the rule comfyui requires the encoded empty prompt")
    else:
        weighted = jnp.where(weight == 1, tokens, empty.tokens + (tokens - empty.tokens) * weight)
    return Text(weighted, text.mask, text.pooled)
