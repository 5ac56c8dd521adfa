"""The digits of `digits` with texts instead of labels, for networks that are conditioned on text."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from diffusion.core.build import build
from diffusion.core.types import ConditionSpec, InputError, Source, Spec, Text

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "digit")
MOST_WORDS = 2  # of a text


class DigitsText:
    """Images `[8, 8, 1]` in [-1, 1] with `text`: in turn "digit three" and "three", as integer tokens."""

    def __init__(self, digits: Source):
        self.digits = digits
        self.spec = Spec(digits.spec.x, {"text": ConditionSpec("text", (MOST_WORDS,), vocabulary=len(WORDS))})

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self.digits[index]
        word = WORDS[example["cond"]["label"]]
        text = self.encode([word if index % 2 else f"digit {word}"])
        return {"x": example["x"], "cond": {"text": Text(text.tokens[0], text.mask[0])}}

    @staticmethod
    def encode(texts: Sequence[str]) -> Text:
        """Returns texts of up to two of WORDS, whose indices are the tokens; `[N, 2]` each."""
        tokens, mask = np.zeros((len(texts), MOST_WORDS), np.int32), np.zeros((len(texts), MOST_WORDS), bool)
        for row, text in enumerate(texts):
            words = text.split()
            if len(words) > MOST_WORDS or not set(words) <= set(WORDS):
                raise InputError("text", f"must be at most {MOST_WORDS} of: {', '.join(WORDS)}; got {text!r}")
            tokens[row, : len(words)], mask[row, : len(words)] = [WORDS.index(word) for word in words], True
        return Text(tokens, mask)


def make(split: Literal["train", "test"] = "train") -> DigitsText:
    """Loads the digits. The network embeds the words of their texts itself.

    Args:
      split: `train` (1,500 images) or `test` (the other 297).
    """
    return DigitsText(build("data", {"name": "digits", "split": split}))
