"""The match of captions and pictures of coloured shapes: by parts on pictures made by hand, and on drawn ones."""

import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.data.shape_captions import UNSEEN
from diffusion.data.sources.shapes import Thing
from diffusion.evaluation.caption_match import matches
from tests.refusals import refused

RED = Thing("large", "red", "circle", "top left")
BLUE = Thing("small", "blue", "square", "right")
CYAN = Thing("small", "cyan", "circle", "bottom")
PARTS = ("exact", "objects", "colours", "counts", "relations")


@pytest.mark.parametrize(
    ("prompt", "things", "expected"),
    [
        ("a red circle and a blue square", (RED, BLUE), (1, 1, 1, 1, None)),
        ("a red circle and a blue square", (RED, BLUE, CYAN), (0, 1, 1, 0, None)),  # one too many
        ("a red circle and a blue square", (RED,), (0, 0, 0, 0, None)),
        ("a blue circle and a red square", (RED, BLUE), (0, 1, 0, 1, None)),  # colours exchanged
        ("a red circle", (RED, CYAN), (0, 1, 1, 0, None)),
        ("two red circles", (RED, CYAN), (0, 1, 1, 1, None)),
        ("a small red circle", (RED,), (0, 1, 1, 1, None)),
        ("a large red circle", (RED,), (1, 1, 1, 1, None)),
        ("a red circle at the top left", (RED,), (1, 1, 1, 1, 1)),
        ("a red circle at the top", (RED,), (0, 1, 1, 1, 0)),
        ("a red circle at the top left and a blue square at the top", (RED, BLUE), (0, 1, 1, 1, 0)),
        ("a red circle left of a blue square", (RED, BLUE), (1, 1, 1, 1, 1)),
        ("a red circle above a blue square", (BLUE, RED), (1, 1, 1, 1, 1)),
        ("a red circle below a blue square", (RED, BLUE), (0, 1, 1, 1, 0)),
        ("a blue square left of a red circle", (RED, BLUE), (0, 1, 1, 1, 0)),
        ("a red circle left of a blue square", (RED, BLUE, CYAN), (0, 1, 1, 0, 1)),
        ("a cyan circle left of a blue square", (RED, BLUE), (0, 1, 0, 1, 0)),
        ("a small red circle left of a blue square", (RED, BLUE), (0, 1, 1, 1, 1)),
        # A thing may stand for one item only: the first item must leave the circle at the top left to the second.
        ("a red circle and a large red circle", (RED, RED), (1, 1, 1, 1, None)),
        ("a large red circle and a red circle", (RED,), (0, 1, 1, 0, None)),
        ("a red circle", (), (0, 0, 0, 0, None)),
    ],
)
def test_parts_of_a_match(prompt, things, expected):
    found = matches(prompt, things)
    assert tuple(found) == PARTS
    assert tuple(None if value is None else int(value) for value in found.values()) == expected


def test_items_share_things_in_the_best_way():
    other = Thing("small", "red", "circle", "bottom")
    assert matches("a red circle and a large red circle", (RED, other))["exact"]
    assert matches("a large red circle and a red circle", (RED, other))["exact"]
    assert not matches("a large red circle and a large red circle", (RED, other))["exact"]


@pytest.fixture(scope="module")
def source():
    return build("data", {"name": "shapes", "captions": "varied", "max_things": 4})


def test_captions_match_their_own_pictures_and_no_others(source):
    metric = build("evaluation", "caption_match", train=source, held_out=source)
    examples = [source[index] for index in range(300)]
    x, prompts = np.stack([e["x"] for e in examples]), np.array([e["caption"] for e in examples])
    state = metric.init()
    for part in (slice(0, 100), slice(100, 300)):
        state = metric.update(state, x[part], {"prompt": prompts[part]})
    assert metric.result(state) == dict.fromkeys(metric.names, 1.0)
    values = metric.result(metric.update(metric.init(), np.roll(x, 1, axis=0), {"prompt": prompts}))
    assert values["caption_match"] < 0.02 and values["caption_objects"] > 0.3

    # A picture with one thing more, less or in another colour, size, shape or place that the caption mentions.
    for index in range(100):
        things, caption = source.things(index), prompts[index]
        assert not matches(caption, things[1:])["exact"]
        assert not matches(caption, (*things, Thing("small", "grey", "square", "center")))["exact"]
        for word, other in (("large", "small"), ("red", "grey"), ("circle", "square"), ("left", "right")):
            if len(things) == 1 and word in caption.split():
                said = {name: value.replace(word, other) for name, value in vars(things[0]).items()}
                assert not matches(caption, [Thing(**said)])["exact"]


def test_shares_are_over_the_prompts_that_they_concern(source):
    metric = build("evaluation", {"name": "caption_match", "by_combination": True}, train=source, held_out=source)
    index = 0
    empty, drawn = np.full(source.spec.shape, -1.0), source[index]["x"]
    x = np.stack([empty, empty, drawn])
    prompts = ["a red circle", "a red square", source[index]["caption"]]  # of seen, unseen and the example's pairs
    unseen = any((thing.colour, thing.shape) in UNSEEN for thing in source.things(index))
    values = metric.result(metric.update(metric.init(), x, {"prompt": prompts}))
    assert values["caption_match"] == pytest.approx(1 / 3)
    assert (values["caption_match_seen"], values["caption_match_unseen"]) == ((0, 0.5) if unseen else (0.5, 0))
    nothing = metric.result(metric.update(metric.init(), x[:1], {"prompt": prompts[:1]}))
    assert nothing["caption_relations"] == nothing["caption_match_unseen"] == 1 and nothing["caption_match_seen"] == 0


def test_what_cannot_be_measured_is_refused(source, digits):
    for held_out in (digits, build("data", {"name": "moving_shapes", "captions": True}), build("data", "shapes")):
        with refused("evaluation.name"):
            build("evaluation", "caption_match", train=held_out, held_out=held_out)
    with refused("evaluation.num"):
        build("evaluation", {"name": "caption_match", "num": 0}, train=source, held_out=source)
    metric = build("evaluation", "caption_match", train=source, held_out=source)
    with refused("name"):
        metric.update(metric.init(), np.zeros((1, 32, 32, 3)), {})
