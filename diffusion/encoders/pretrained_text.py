"""Text encoders in folders, with the tokenizers next to them, as `TextEncoder`s.

A pipeline folder of diffusers has `text_encoder`, `text_encoder_2`, ... and `tokenizer`, `tokenizer_2`, ... . A single
file of Stable Diffusion (`core.single_file`) has text encoders without tokenizers.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from diffusion.core import model_folder, single_file
from diffusion.core.types import Array, ConditionSpec, InputError, Params, Text, TextEncoder
from diffusion.encoders import text_conditions, text_folder, tokenizers
from diffusion.encoders.text_folder import PROJECTED
from diffusion.encoders.text_transformers import Pooled

Null = Literal["empty", "zeros", "learned"]
Place = Callable[[Params], Any]
_PADDING = {"quick_gelu": "<|endoftext|>", "gelu": "!"}  # of CLIP and of OpenCLIP
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


@dataclasses.dataclass(frozen=True)
class Folder:
    """Where a text encoder and its tokenizer are; `tokenizer` is None if there is none."""

    model: str
    tokenizer: str | None


@dataclasses.dataclass(frozen=True)
class Tokenizers:
    """Tokenizes texts for several encoders: a dict of what each one's function returns."""

    parts: Mapping[str, Callable[[Sequence[str]], Text]]

    def __call__(self, texts: Sequence[str]) -> dict[str, Text]:
        return {name: tokenize(texts) for name, tokenize in self.parts.items()}


@dataclasses.dataclass(frozen=True)
class _Blank:
    """Stands for the tokenizer of an encoder that is only planned with: its tokens have the right shape."""

    length: int

    def __call__(self, texts: Sequence[str]) -> Text:
        shape = len(texts), self.length
        return Text(np.zeros(shape, np.int32), np.ones(shape, bool))


def find(
    path: str, kinds: Sequence[str], part: str | None = None, tokenizer: str | None = None, *, weights: bool,
    field: str = "part",
) -> Folder:  # fmt: skip
    """Finds a text encoder and its tokenizer.

    Args:
      path: The folder of the encoder, or that of a pipeline.
      kinds: The kinds to look for (`text_folder.Stored`).
      part: The folder of the encoder in that of the pipeline. None: the first of these kinds.
      tokenizer: The folder of the tokenizer, or that of a pipeline with one. None: `tokenizer*` of the pipeline of the
        encoder, or the folder of the encoder.
      weights: Whether the encoder is to be used, and not only planned with, so that it needs its tokenizer.
      field: The field of the error for a `part` that is not there.

    Raises:
      InputError: There is no such folder, or its encoder is of another kind.
    """
    if part is None and "config.json" in model_folder.names(path):
        model = path.rstrip("/")
    else:
        parts = parts_of(path)
        if part is not None and part not in parts:
            raise InputError(field, f"{path} has no {part!r}; one of: {', '.join(parts) or 'none'}")
        of_kind = [name for name in parts if part in (None, name) and parts[name] in kinds]
        if not of_kind:
            found = ", ".join(f"{name} ({kind})" for name, kind in parts.items()) or "no text encoder"
            raise InputError("path", f"{path} must have a {' or '.join(kinds)}; it has {found}")
        model = os.path.join(path, of_kind[0])
    if (kind := text_folder.kind_of(model)) not in kinds:
        raise InputError("path", f"{model} must have a {' or '.join(kinds)}, got a {kind}")
    sibling = os.path.join(os.path.dirname(model), os.path.basename(model).replace("text_encoder", "tokenizer", 1))
    in_pipeline = [os.path.join(tokenizer or "", name) for name in (os.path.basename(sibling), "tokenizer")]
    for folder in (tokenizer, *in_pipeline) if tokenizer else (sibling, model):
        if any(os.path.isfile(os.path.join(folder, name)) for name in TOKENIZER_FILES):
            return Folder(model, folder)
    files = ", ".join(TOKENIZER_FILES)
    if tokenizer:
        raise InputError("tokenizer", f"{tokenizer} has none of {files}")
    if weights and single_file.split(model):
        problem = f"must be given: {path} has no tokenizer; use a folder with CLIP's, or that of a pipeline"
        raise InputError("tokenizer", problem)
    if weights:
        raise InputError("path", f"there is no tokenizer ({files}) in {model} or {sibling}; copy it there")
    return Folder(model, None)


def tokenizer_of(folder: Folder, length: int | None = None) -> tokenizers.Tokenizer:
    """Reads the tokenizer of a text encoder; see `tokenizers.read`. For a single file, it has the padding of the
    encoder, because it comes from another model."""
    if not single_file.split(folder.model):
        return tokenizers.read(folder.tokenizer, length)
    function = model_folder.read_json(folder.model, "config.json")["hidden_act"]
    return tokenizers.read(folder.tokenizer, length, _PADDING[function])


def parts_of(path: str) -> dict[str, str]:
    """Returns the kinds of the text encoders in the folder of a pipeline, by the names of their folders."""
    names = model_folder.names(path)
    if not names and not os.path.isdir(path):
        raise InputError("path", f"{path} is not a folder")
    folders = {name: os.path.join(path, name) for name in names if re.fullmatch(r"text_encoder(_\d+)?", name)}
    return {name: text_folder.kind_of(folder) for name, folder in folders.items()
            if "config.json" in model_folder.names(folder)}  # fmt: skip


def forces_zeros(path: str) -> bool:
    """Returns whether zeros stand for a dropped text of SDXL, given the folder of its pipeline or of its encoders."""
    if "model_index.json" not in model_folder.names(path):
        return True
    return bool(model_folder.read_json(path, "model_index.json").get("force_zeros_for_empty_prompt", True))


def clip(
    folder: Folder, *, hidden_state: Literal["last", "penultimate"] | int, final_norm: bool, pooled: Pooled,
    length: int | None, use_mask: bool, dtype: str, variant: str | None, weights: bool, place: Place | None,
) -> TextEncoder:  # fmt: skip
    """Returns a CLIP encoder without a null value; see `encoders.text.clip.make`.

    Args:
      final_norm: Whether the final norm follows a state that `hidden_state` gives as a number.
    """
    stored = text_folder.read(folder.model, variant, weights, place)
    config, encode = stored.config, stored.transformer(dtype).encode
    if pooled == "projected" and stored.kind != PROJECTED:
        raise InputError("pooled", f"must be none or eos: {folder.model} has no projection, as it is a {stored.kind}")
    skip = {"last": 0, "penultimate": 1}.get(hidden_state, hidden_state)
    final_norm = {"last": True, "penultimate": False}.get(hidden_state, final_norm)
    if not 0 <= skip <= config["num_hidden_layers"]:
        problem = f"must leave out 0 to {config['num_hidden_layers']} layers"
        raise InputError("hidden_state", f"{problem}, got {hidden_state}")
    most = config["max_position_embeddings"]
    if length is not None and not 1 <= length <= most:
        raise InputError("length", f"must be in 1 .. {most}, the positions of {folder.model}, got {length}")
    length = length or most

    def skipping(count: int) -> Callable[[Params, Text], Text]:
        most = config["num_hidden_layers"] - skip
        if not 0 <= count <= most:
            raise InputError("clip_skip", f"must be 0 to {most}, the layers of {folder.model}, got {count}")

        def encode_text(params: Params, tokens: Text) -> Text:
            hidden, vector = encode(params, tokens.tokens, skip + count, final_norm, pooled)
            return Text(hidden, _mask(tokens, use_mask), vector)

        return encode_text

    widths = {"none": 0, "eos": config["hidden_size"], "projected": config["projection_dim"]}
    condition = ConditionSpec("text", (length, config["hidden_size"]), pooled=widths[pooled])
    encoder = _encoder(stored, folder, condition, skipping(0), f"{skip} {final_norm} {pooled} {use_mask}")
    return dataclasses.replace(encoder, skipping=skipping)


def t5(
    folder: Folder, *, length: int, use_mask: bool, dtype: str, variant: str | None, weights: bool, place: Place | None,
) -> TextEncoder:  # fmt: skip
    """Returns a T5 encoder without a null value; see `encoders.text.t5.make`."""
    stored = text_folder.read(folder.model, variant, weights, place)
    encode = stored.transformer(dtype).encode
    if length < 1:
        raise InputError("length", f"must be at least 1, got {length}")

    def encode_text(params: Params, tokens: Text) -> Text:
        return Text(encode(params, tokens.tokens, tokens.mask if use_mask else None), _mask(tokens, use_mask))

    condition = ConditionSpec("text", (length, stored.config["d_model"]))
    return _encoder(stored, folder, condition, encode_text, f"{use_mask}")


def trained(encoder: TextEncoder, null: Null, *, weights: bool) -> TextEncoder:
    """Returns an encoder whose parameters are trained with those of the network, from the ones that were read.

    Args:
      encoder, null: See `with_null`. The empty text is encoded in every step.
      weights: Whether the encoder has its weights, and not only their shapes.
    """

    def zeros(params: Params) -> Text:
        return jax.tree.map(jnp.asarray, encoder.condition.zeros(1))

    def empty(params: Params) -> Text:
        return encoder.encode(params, encoder.tokenize([""]))

    def init(key: Array) -> Params:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), shapes)

    shapes = jax.eval_shape(lambda params: params, encoder.params)
    value = {"empty": empty, "zeros": zeros, "learned": None}[null]
    return TextEncoder(
        encoder.tokenize, encoder.condition, digest=digest_of([encoder.digest, "trained"]),
        attach=lambda network: text_conditions.attach(network, init, encoder.encode, value),
        start=jax.tree.map(lambda leaf: leaf.astype(jnp.float32), encoder.params) if weights else None,
    )  # fmt: skip


def with_null(encoder: TextEncoder, null: Null, *, weights: bool) -> TextEncoder:
    """Returns an encoder with the value that stands for a dropped text.

    Args:
      encoder: An encoder without one.
      null: `empty`: the encoded empty text. `zeros`: zeros, of which none is padding. `learned`: None.
      weights: Whether the encoder has its weights, and not only their shapes. Without them, so does the null value.
    """
    if null == "learned":
        return encoder

    def zeros() -> Text:
        return jax.tree.map(jnp.asarray, encoder.condition.zeros(1))

    if not weights:
        return dataclasses.replace(encoder, null=jax.eval_shape(zeros))
    if null == "zeros":
        return dataclasses.replace(encoder, null=zeros())
    sharding = jax.tree.leaves(encoder.params)[0].sharding
    whole = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    value = jax.jit(encoder.encode, out_shardings=whole)(encoder.params, encoder.tokenize([""]))
    return dataclasses.replace(encoder, null=jax.device_get(value))


def skipped(encoder: TextEncoder | None, clip_skip: int) -> TextEncoder:
    """Returns an encoder that leaves out the last layers of CLIP for prompts, as `clip_skip` of diffusers does.

    Negative prompts and the null text are encoded by all layers, and so is the pooled embedding.

    Args:
      clip_skip: How many layers, in addition to those that the encoder leaves out anyway.

    Raises:
      InputError: There is no encoder, it reads no hidden states of CLIP, or CLIP has fewer layers.
    """
    if encoder is None or encoder.skipping is None:
        raise InputError("clip_skip", "requires a text encoder with layers of CLIP; leave it out")
    return dataclasses.replace(encoder, encode=encoder.skipping(clip_skip), encode_null=encoder.encode)


def digest_of(parts: Sequence[str]) -> str:
    """Returns the digest of several digests; empty if one of them is."""
    return hashlib.sha256("".join(parts).encode()).hexdigest() if all(parts) else ""


def _encoder(
    stored: text_folder.Stored, folder: Folder, condition: ConditionSpec, encode: Callable[[Params, Any], Text],
    options: str,
) -> TextEncoder:  # fmt: skip
    """Returns the encoder of a folder; `options` says in the digest what else its output depends on."""
    if folder.tokenizer is None:
        return TextEncoder(_Blank(condition.shape[0]), condition, stored.params, encode)
    tokenizer = tokenizer_of(folder, condition.shape[0])
    if tokenizer.vocabulary > stored.config["vocab_size"]:
        problem = f"has {tokenizer.vocabulary} ids, the embedding of {folder.model} {stored.config['vocab_size']} rows"
        raise InputError("tokenizer", f"{folder.tokenizer} {problem}; use the tokenizer of this model")
    digest = digest_of([stored.digest, tokenizer.digest, options])
    return TextEncoder(tokenizer, condition, stored.params, encode, digest=digest)


def _mask(tokens: Text, use_mask: bool) -> Array:
    return tokens.mask if use_mask else jnp.ones_like(tokens.mask)
