"""The share of samples that show what their prompts say: objects, colours, counts and relations of coloured shapes."""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import permutations
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from diffusion.core import checks
from diffusion.core.types import InputError, Source
from diffusion.data import shape_captions

PARTS = ("exact", "objects", "colours", "counts", "relations")


def matches(prompt: str, things: Iterable[shape_captions.Thing]) -> dict[str, bool | None]:
    """Returns what of a prompt is true of a picture, in the manner of GenEval (Ghosh et al. 2023, arXiv 2310.11513).

    Args:
      prompt: A caption in the grammar of `data.shape_captions`.
      things: The shapes in the picture, each with `size`, `colour`, `shape` and `place`.

    Returns:
      exact: Everything that is said is true, and there is nothing else in the picture.
      objects: Each shape that is named is there, in any colour and number.
      colours: Each shape that is named is there in its colour.
      counts: There are as many circles, squares and triangles as the prompt says, in any colour.
      relations: All that is said of places and relations is true of shapes of those colours. None if nothing is said.

    Raises:
      InputError: The prompt is not in the grammar; the error names the word.
    """
    caption, things = shape_captions.parse(prompt), list(things)
    items = [item for item in caption.items for _ in range(item.count)]
    fits = np.array([[item.fits(thing) for thing in things] for item in items]).reshape(len(items), len(things))
    exact = len(items) == len(things) and fits[linear_sum_assignment(fits, maximize=True)].all()
    positions = []
    if caption.relation:
        pairs = [pair for pair in permutations(things, 2) if shape_captions.holds(caption.relation, *pair)]
        exact = exact and any(all(map(shape_captions.Item.fits, caption.items, pair)) for pair in pairs)
        positions.append(any(all(map(_is_like, caption.items, pair)) for pair in pairs))
    where = {(thing.colour, thing.shape, thing.place) for thing in things}
    positions += [(item.colour, item.shape, item.place) in where for item in caption.items if item.place]
    named, found = Counter(item.shape for item in items), Counter(thing.shape for thing in things)
    return {
        "exact": bool(exact),
        "objects": named.keys() <= found.keys(),
        "colours": {(item.colour, item.shape) for item in items} <= {(thing.colour, thing.shape) for thing in things},
        "counts": named == found,
        "relations": all(positions) if positions else None,
    }


def _is_like(item: shape_captions.Item, thing: shape_captions.Thing) -> bool:
    return (item.colour, item.shape) == (thing.colour, thing.shape)


class CaptionMatch:
    """A `SampleMetric` that compares samples with their prompts, `conditions["prompt"]`; see `matches`.

    The values are the shares of the samples of which each part is true: `caption_match` (`exact`), `caption_objects`,
    `caption_colours`, `caption_counts` and `caption_relations`. The last is over the samples whose prompts say
    something of places or relations. `caption_match_seen` and `caption_match_unseen`, if they are requested, are over
    the samples whose prompts name no pair of a colour and a shape of `data.shape_captions.UNSEEN`, and over the others.
    Shares over no sample are 1.
    """

    kind = "samples"

    def __init__(self, num: int, guidance: float, source: Source, by_combination: bool = False):
        self.num, self.guidance, self.source = num, guidance, source
        self.names = ("caption_match", "caption_objects", "caption_colours", "caption_counts", "caption_relations")
        self.names += ("caption_match_seen", "caption_match_unseen") * by_combination

    def init(self) -> np.ndarray:
        """Returns, for each of the names, how often it is true and how often it is known, `[5 or 7, 2]`."""
        return np.zeros((len(self.names), 2), np.int64)

    def update(self, state: np.ndarray, images: np.ndarray, conditions: Mapping[str, Any]) -> np.ndarray:
        if "prompt" not in conditions:
            raise InputError("name", "caption_match requires samples of prompts; the model is not conditioned on text")
        pictures, _ = self.source.closest(images)
        for prompt, things in zip(conditions["prompt"], pictures, strict=True):
            found = matches(str(prompt), things)
            rows = [(found[part] is True, found[part] is not None) for part in PARTS]
            named = {(item.colour, item.shape) for item in shape_captions.parse(str(prompt)).items}
            is_unseen = bool(named & shape_captions.UNSEEN)
            rows += [(found["exact"] and is_unseen == unseen, is_unseen == unseen) for unseen in (False, True)]
            state += rows[: len(state)]
        return state

    def result(self, state: np.ndarray) -> dict[str, float]:
        true, known = state.T
        return dict(zip(self.names, np.where(known, true / np.maximum(known, 1), 1.0).tolist(), strict=True))


def make(
    train: Source, held_out: Source, num: int = 1000, guidance: float = 1.0, by_combination: bool = False
) -> CaptionMatch:
    """Builds the metric.

    Args:
      num: Number of samples.
      guidance: Guidance scale of the samples.
      by_combination: Whether to report prompts with unseen combinations apart; for held-out data of all combinations.
    """
    checks.at_least(1, num=num)
    if not hasattr(held_out, "closest") or not hasattr(held_out.things(0)[0], "place"):
        raise InputError("name", "caption_match requires data whose captions it can read: shapes")
    if not held_out.spec.captions:
        raise InputError("name", "caption_match requires prompts; set captions of the held-out data")
    return CaptionMatch(num, guidance, held_out, by_combination)
