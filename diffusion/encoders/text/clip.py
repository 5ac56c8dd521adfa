"""CLIP's text model in folders of transformers: that of Stable Diffusion 1 and 2, and each of those of SDXL, Stable
Diffusion 3 and Flux."""

from collections.abc import Callable
from typing import Any, Literal

from diffusion.core.types import TextEncoder
from diffusion.encoders import pretrained_text
from diffusion.encoders.text_folder import CLIP, PROJECTED


def make(
    path: str,
    part: str | None = None,
    tokenizer: str | None = None,
    hidden_state: Literal["last", "penultimate"] | int = "last",
    pooled: Literal["none", "eos", "projected"] = "none",
    length: int | None = None,
    use_mask: bool = False,
    null: Literal["empty", "zeros", "learned"] = "empty",
    variant: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    trained: bool = False,
    weights: bool = True,
    place: Callable[..., Any] | None = None,
) -> TextEncoder:
    """Reads a text encoder, without pickles.

    Args:
      path: The folder of a `CLIPTextModel` or `CLIPTextModelWithProjection`, with `config.json` and safetensors, or
        that of a pipeline, or a single file of Stable Diffusion.
      part: The folder of the encoder in that of the pipeline, such as `text_encoder_2`. None: the first CLIP.
      tokenizer: The folder of the tokenizer, or that of a pipeline with one. A single file needs it. None: `tokenizer*`
        of the pipeline, or the folder of the encoder.
      hidden_state: `last`: the state after all layers and the final norm, as for Stable Diffusion 1 and 2. A number k
        leaves out the last k layers, and the final norm follows: `clip_skip` of diffusers, and one less than that of
        other tools. `penultimate`: before the last layer, without the final norm, as for SDXL and Stable Diffusion 3.
      pooled: The embedding of the whole text. `eos`: the state after all layers and the final norm at the end of the
        text, as for Flux. `projected`: its projection, which a `CLIPTextModelWithProjection` has.
      length: Number of tokens. None: as many as the model has positions, 77.
      use_mask: Whether the network ignores padding. Stable Diffusion attends to it.
      null: What stands for a dropped text: the encoded empty text, zeros, or (`learned`) what the network learns.
      variant: The variant of the weights, such as `fp16`; None: the weights without one, or the only ones.
      dtype: The dtype of the operands of matrix products. The parameters keep the dtype that they are stored with, and
        the result is float32.
      trained: Whether the parameters are trained with those of the network, in float32, and saved with them. Those that
        are read are what they start from.
      weights: Whether to read the weights; given by the caller. A plan does without them and needs `config.json` alone.
      place: Maps the shapes of the parameters to their shardings; given by the caller. None: the default device.

    Raises:
      InputError: The folder cannot be read, its model is not supported, or the tokenizer is not that of the model.
    """
    folder = pretrained_text.find(path, (CLIP, PROJECTED), part, tokenizer, weights=weights)
    encoder = pretrained_text.clip(folder, hidden_state=hidden_state, final_norm=True, pooled=pooled, length=length,
                                   use_mask=use_mask, dtype=dtype, variant=variant, weights=weights,
                                   place=place)  # fmt: skip
    return (pretrained_text.trained if trained else pretrained_text.with_null)(encoder, null, weights=weights)
