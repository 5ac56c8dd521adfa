"""Writes the smallest text encoders and tokenizers, and pipelines of them, as folders of diffusers."""

import json
import pathlib

import jax
import numpy as np

from diffusion.encoders import text_folder
from diffusion.encoders.text_folder import CLIP, PROJECTED, T5, Stored

CLIP_CONFIG = {
    "vocab_size": 514, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 16, "projection_dim": 6, "layer_norm_eps": 1e-5, "hidden_act": "quick_gelu",
    "eos_token_id": 2,
}  # fmt: skip
T5_CONFIG = {
    "vocab_size": 64, "d_model": 20, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "layer_norm_epsilon": 1e-6,
}  # fmt: skip
PIPELINES = {"sdxl": (CLIP, PROJECTED), "sd3": (PROJECTED, PROJECTED, T5), "flux": (CLIP, T5)}


def stored_of(kind: str, dtype=np.float32, seed: int = 0, **changes) -> Stored:
    """Returns a text encoder with random parameters, of which none is 0, and with changed entries of its config."""
    stored = Stored(kind, (T5_CONFIG if kind == T5 else CLIP_CONFIG) | changes, None)
    shapes, rng = jax.eval_shape(stored.transformer().init, jax.random.key(0)), np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: (rng.normal(size=leaf.shape) / 2).astype(dtype), shapes)
    return Stored(kind, stored.config, params)


def write_clip_tokenizer(folder: pathlib.Path) -> None:
    """Writes a tokenizer of CLIP without merges: the symbols of bytes, within and at the end of words."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = [*map(chr, printable), *(chr(256 + number) for number in range(len(others)))]
    names = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({name: number for number, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": "<|endoftext|>"}  # fmt: skip
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": CLIP_CONFIG["max_position_embeddings"]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | special))


def write_t5_tokenizer(folder: pathlib.Path) -> None:
    """Writes a tokenizer of T5 whose pieces are letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "T5Tokenizer", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_encoder(folder: pathlib.Path, stored: Stored, tokenizer: pathlib.Path | None = None) -> str:
    """Writes an encoder, and its tokenizer into the same folder or another one; returns the folder as a text."""
    text_folder.write(str(folder), stored)
    (write_t5_tokenizer if stored.kind == T5 else write_clip_tokenizer)(tokenizer or folder)
    return str(folder)


def write_pipeline(folder: pathlib.Path, layout: str) -> str:
    """Writes the text encoders and the tokenizers of a pipeline; returns the folder as a text."""
    for number, kind in enumerate(PIPELINES[layout]):
        suffix = f"_{number + 1}" if number else ""
        stored = stored_of(kind, seed=number, **({"hidden_act": "gelu"} if number == 1 and kind != T5 else {}))
        write_encoder(folder / f"text_encoder{suffix}", stored, folder / f"tokenizer{suffix}")
    return str(folder)
