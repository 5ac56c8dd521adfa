"""The encoder of T5 v1.1 in folders of transformers: that of Stable Diffusion 3, Flux and PixArt."""

from collections.abc import Callable
from typing import Any, Literal

from diffusion.core.types import TextEncoder
from diffusion.encoders import pretrained_text
from diffusion.encoders.text_folder import T5


def make(
    path: str,
    part: str | None = None,
    tokenizer: str | None = None,
    length: int = 256,
    use_mask: bool = False,
    null: Literal["empty", "zeros", "learned"] = "empty",
    variant: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    trained: bool = False,
    weights: bool = True,
    place: Callable[..., Any] | None = None,
) -> TextEncoder:
    """Reads a text encoder, without pickles.

    Args:
      path: The folder of a `T5EncoderModel`, with `config.json` and safetensors, or that of a pipeline.
      part: The folder of the encoder in that of the pipeline, such as `text_encoder_3`. None: the first T5.
      tokenizer: The folder of the tokenizer. None: `tokenizer*` of the pipeline, or the folder of the encoder.
      length: Number of tokens: 256 for Stable Diffusion 3 and Flux schnell, 512 for Flux dev.
      use_mask: Whether padding is not attended to, neither in the encoder nor by the network. Stable Diffusion 3 and
        Flux attend to it; PixArt does not.
      null, variant, trained, weights, place: As for `clip`.
      dtype: The dtype of the operands of matrix products; see `clip`.

    Raises:
      InputError: The folder cannot be read, its model is not supported, or the tokenizer is not that of the model.
    """
    folder = pretrained_text.find(path, (T5,), part, tokenizer, weights=weights)
    encoder = pretrained_text.t5(folder, length=length, use_mask=use_mask, dtype=dtype, variant=variant,
                                 weights=weights, place=place)  # fmt: skip
    return (pretrained_text.trained if trained else pretrained_text.with_null)(encoder, null, weights=weights)
