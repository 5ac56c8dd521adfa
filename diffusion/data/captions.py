"""Sources whose captions become the condition `text`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from diffusion.core.types import InputError, Source, TextEncoder

PASSED_ON = ("buckets", "encoder", "decoded_spec", "path")  # attributes of the source that `Tokenized` has as well


class Tokenized:
    """A source with the tokens of its captions as the condition `text`.

    A caption of several lines is several captions of one example: training draws one of them, and `source[index]` takes
    the first.

    Args:
      source: The source; its spec has `captions`.
      tokenize: See `TextEncoder`.
    """

    def __init__(self, source: Source, tokenize: Callable[[Sequence[str]], Any]):
        self.source, self.tokenize, self.spec = source, tokenize, source.spec

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.source[index]
        return self._tokenized(example, captions_of(example)[0])

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns the example for training, with one of its captions."""
        example = self.source.draw(index, rng) if hasattr(self.source, "draw") else self.source[index]
        captions = captions_of(example)
        return self._tokenized(example, captions[rng.integers(len(captions))] if len(captions) > 1 else captions[0])

    def __getattr__(self, name: str) -> Any:
        if name in PASSED_ON:
            return getattr(self.source, name)
        raise AttributeError(name)

    def _tokenized(self, example: Mapping[str, Any], caption: str) -> dict[str, Any]:
        tokens = jax.tree.map(lambda array: array[0], self.tokenize([caption]))
        others = {name: value for name, value in example.items() if name != "caption"}
        return {**others, "cond": {**example["cond"], "text": tokens}}


def captions_of(example: Mapping[str, Any]) -> list[str]:
    """Returns the captions of an example, one per line of its caption; one empty caption if it has none."""
    return [line for line in example["caption"].splitlines() if line.strip()] or [""]


def is_text_encoded(source: Source) -> bool:
    """Returns whether the text of a source's examples was encoded in advance."""
    return getattr(source, "text_encoder", None) is not None


def with_text(source: Source, encoder: TextEncoder | None) -> Source:
    """Returns a source whose examples have the condition `text` of an encoder.

    Raises:
      InputError: The source has captions and there is no encoder, or the opposite, or another one has encoded them.
    """
    if encoder is None:
        if is_text_encoded(source):
            problem = "is missing, and data holds encoded captions; set the one that has encoded them"
            raise InputError("text_encoder", problem)
        if source.spec.captions:
            problem = "is True, and no text encoder reads the captions; set text_encoder, or captions to False"
            raise InputError("data.captions", problem)
        return source
    if is_text_encoded(source):
        if encoder.attach is not None:
            problem = "holds encoded captions, and the text encoder is trained, so it has to encode them in every step"
            raise InputError("data", f"{problem}; use data with captions")
        if source.text_encoder != encoder.digest:
            digests = f"SHA-256 {source.text_encoder[:12]}..., got {encoder.digest[:12]}..."
            problem = f"is not the encoder that the captions in data were encoded with ({digests})"
            raise InputError("text_encoder.path", f"{problem}; restore the path, or encode them again")
        return source
    if isinstance(source, Tokenized):
        return source
    if "text" in source.spec.conditions:
        raise InputError("text_encoder", "is set, and the data have their own condition 'text'; leave one out")
    if not source.spec.captions:
        raise InputError("data.captions", "must be True, as text_encoder reads captions; the data need them")
    return Tokenized(source, encoder.tokenize)


def of_source(source: Source) -> Callable[[int], str]:
    """Returns a function that returns the first caption of an example of a source by its index."""
    source = source.source if isinstance(source, Tokenized) else source
    return source.caption if is_text_encoded(source) else lambda index: captions_of(source[index])[0]
