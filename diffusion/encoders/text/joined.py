"""The text encoders of pipelines that have several: SDXL, Stable Diffusion 3 and Flux.

layout   tokens                                        features                    pooled
sdxl     those of clip                                 [clip, clip_2]              clip_2
sd3      those of clip, then those of t5               [clip, clip_2, 0], then t5  [clip, clip_2]
flux     those of t5                                   t5                          clip, not projected
"""

import os
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp

from diffusion.core import model_folder
from diffusion.core.types import ConditionSpec, InputError, Params, Text, TextEncoder, TextPart
from diffusion.encoders import pretrained_text
from diffusion.encoders.text_folder import CLIP, PROJECTED, T5

Layout = Literal["sdxl", "sd3", "flux"]
# The folder, the kinds and the pooled output of each encoder by its name.
_LAYOUTS = {
    "sdxl": {"clip": ("text_encoder", (CLIP, PROJECTED), "none"),
             "clip_2": ("text_encoder_2", (PROJECTED,), "projected")},
    "sd3": {"clip": ("text_encoder", (PROJECTED,), "projected"),
            "clip_2": ("text_encoder_2", (PROJECTED,), "projected"), "t5": ("text_encoder_3", (T5,), "none")},
    "flux": {"clip": ("text_encoder", (CLIP, PROJECTED), "eos"), "t5": ("text_encoder_2", (T5,), "none")},
}  # fmt: skip
_LENGTHS = {"sdxl": None, "sd3": 256, "flux": 512}
_SD3_WIDTH = 4096  # of the tokens, where neither T5 nor the transformer is in the folder


def make(
    path: str,
    layout: Layout,
    tokenizer: str | None = None,
    length: int | None = None,
    clip_skip: int = 0,
    without_t5: bool = False,
    use_mask: bool = False,
    null: Literal["auto", "empty", "zeros", "learned"] = "auto",
    variant: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    trained: bool = False,
    weights: bool = True,
    place: Callable[..., Any] | None = None,
) -> TextEncoder:
    """Reads the text encoders of a pipeline, without pickles. Their parameters are `{"clip", "clip_2", "t5"}`.

    Args:
      path: The folder of the pipeline, with `text_encoder`, `tokenizer`, `text_encoder_2`, ...; or a single file of
        SDXL.
      layout: How the outputs are joined; see above. The states of `clip` and `clip_2` are those before the last layer,
        without the final norm.
      tokenizer: As for `clip`. The tokenizers of a pipeline are for the encoders of these numbers.
      length: Number of tokens of T5. None: 256 for `sd3` and 512 for `flux`; Flux schnell has 256.
      clip_skip: The number of layers before the last one that `sdxl` and `sd3` leave out too.
      without_t5: For `sd3`, puts zeros in the place of T5, which is not read. So does a folder without it.
      use_mask: Whether padding is not attended to. All three attend to it.
      null: As for `clip`. `auto`: zeros for `sdxl`, unless `model_index.json` has `force_zeros_for_empty_prompt` =
        false; otherwise the encoded empty text.
      variant: As for `clip`. Encoders that lack the variant are read without one, if another has it.
      dtype, trained, weights, place: As for `clip`. `place` is called for each encoder.

    Raises:
      InputError: A folder cannot be read, or its model is not supported or not that of the layout.
    """
    if layout != "sd3" and without_t5:
        raise InputError("without_t5", f"is for the layout sd3 alone, got {layout}")
    if layout == "sdxl" and length is not None:
        raise InputError("length", "is the number of tokens of T5, which the layout sdxl does not have; remove it")
    length = length or _LENGTHS[layout]
    table = dict(_LAYOUTS[layout])
    if layout == "sd3" and (without_t5 or table["t5"][0] not in pretrained_text.parts_of(path)):
        del table["t5"]
    folders = {name: pretrained_text.find(path, kinds, part, tokenizer, weights=weights, field="path")
               for name, (part, kinds, _) in table.items()}  # fmt: skip
    has = {name: model_folder.has_variant(folder.model, variant, model_folder.TRANSFORMERS_WEIGHTS)
           for name, folder in folders.items()}  # fmt: skip
    encoders = {}
    for name, folder in folders.items():
        options = dict(use_mask=use_mask, dtype=dtype, weights=weights, place=place,
                       variant=variant if has[name] or not any(has.values()) else None)  # fmt: skip
        if name == "t5":
            encoders[name] = pretrained_text.t5(folder, length=length, **options)
        else:
            encoders[name] = pretrained_text.clip(folder, hidden_state=1 + clip_skip, final_norm=False,
                                                  pooled=table[name][2], length=None, **options)  # fmt: skip
    condition, parts, join = _joined(layout, encoders, path, length)

    def encode_by(functions: Mapping[str, Callable[[Params, Text], Text]]) -> Callable[[Params, Any], Text]:
        return lambda params, tokens: join({name: f(params[name], tokens[name]) for name, f in functions.items()})

    def skipping(count: int) -> Callable[[Params, Any], Text]:
        return encode_by({name: encoder.encode if encoder.skipping is None else encoder.skipping(count)
                          for name, encoder in encoders.items()})  # fmt: skip

    encoder = TextEncoder(
        pretrained_text.Tokenizers({name: encoder.tokenize for name, encoder in encoders.items()}),
        condition,
        {name: encoder.params for name, encoder in encoders.items()},
        encode_by({name: encoder.encode for name, encoder in encoders.items()}),
        parts=parts,
        skipping=None if layout == "flux" else skipping,  # Flux reads the pooled embedding of CLIP alone
        digest=pretrained_text.digest_of([layout, *(encoder.digest for encoder in encoders.values())]),
    )
    if null == "auto":
        null = "zeros" if layout == "sdxl" and pretrained_text.forces_zeros(path) else "empty"
    return (pretrained_text.trained if trained else pretrained_text.with_null)(encoder, null, weights=weights)


def _joined(
    layout: Layout, encoders: Mapping[str, TextEncoder], path: str, length: int | None
) -> tuple[ConditionSpec, dict[str, TextPart], Callable[[Mapping[str, Text]], Text]]:
    """Returns the description of the joined text, the place of each part in it, and the function that joins them."""
    (clip_length, clip_width), clip_pooled = encoders["clip"].condition.shape, encoders["clip"].condition.pooled
    if layout == "flux":
        t5_length, width = encoders["t5"].condition.shape
        condition = ConditionSpec("text", (t5_length, width), pooled=clip_pooled)
        parts = {"clip": TextPart((0, 0), (0, 0), (0, clip_pooled)), "t5": TextPart((0, t5_length), (0, width))}
        return condition, parts, lambda texts: Text(texts["t5"].tokens, texts["t5"].mask, texts["clip"].pooled)

    both = clip_width + encoders["clip_2"].condition.shape[1]
    pooled = clip_pooled + encoders["clip_2"].condition.pooled
    if encoders["clip_2"].condition.shape[0] != clip_length:
        raise InputError("path", "the CLIP encoders must have one number of positions; they are of different pipelines")
    parts = {
        "clip": TextPart((0, clip_length), (0, clip_width), (0, clip_pooled)),
        "clip_2": TextPart((0, clip_length), (clip_width, both), (clip_pooled, pooled)),
    }

    def join_clips(texts: Mapping[str, Text]) -> Text:
        clips = texts["clip"], texts["clip_2"]
        vectors = [text.pooled for text in clips if text.pooled is not None]
        tokens = jnp.concatenate([text.tokens for text in clips], axis=-1)
        return Text(tokens, texts["clip"].mask, jnp.concatenate(vectors, axis=-1))

    if layout == "sdxl":
        return ConditionSpec("text", (clip_length, both), pooled=pooled), parts, join_clips

    width = encoders["t5"].condition.shape[1] if "t5" in encoders else _sd3_width(path)
    if both > width:
        raise InputError("path", f"the CLIP encoders have {both} features, which must be at most the {width} of T5")
    total = clip_length + length
    if "t5" in encoders:
        parts["t5"] = TextPart((clip_length, total), (0, width))

    def join(texts: Mapping[str, Text]) -> Text:
        clips = join_clips(texts)
        tokens = jnp.pad(clips.tokens, ((0, 0), (0, 0), (0, width - both)))
        shape = (len(tokens), length)
        t5 = texts["t5"] if "t5" in texts else Text(jnp.zeros((*shape, width)), jnp.ones(shape, bool))
        mask = jnp.concatenate([clips.mask, t5.mask], axis=1)
        return Text(jnp.concatenate([tokens, t5.tokens], axis=1), mask, clips.pooled)

    return ConditionSpec("text", (total, width), pooled=pooled), parts, join


def _sd3_width(path: str) -> int:
    """Returns the width of the tokens that the transformer of a pipeline without T5 reads."""
    folder = os.path.join(path, "transformer")
    if not os.path.isfile(os.path.join(folder, "config.json")):
        return _SD3_WIDTH
    return int(model_folder.read_json(folder, "config.json").get("joint_attention_dim", _SD3_WIDTH))
