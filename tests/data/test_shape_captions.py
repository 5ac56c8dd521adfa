"""The captions of coloured shapes: all are true of their pictures, and the parser reads what they say."""

import itertools
from collections import Counter

import pytest

from diffusion.core.build import build
from diffusion.data.geometry import COLOUR_NAMES, SHAPES
from diffusion.data.shape_captions import PLACES, UNSEEN, Caption, Item, holds, parse
from diffusion.data.sources.shapes import Shapes, Thing
from tests.refusals import refused


def shapes(**keywords):
    return build("data", {"name": "shapes", **keywords})


def test_captions_say_what_they_stand_for():
    red, blue = Item(1, "red", "circle"), Item(2, "blue", "square")
    for text, caption in {
        "a red circle": Caption((red,)),
        "a red circle and two blue squares": Caption((red, blue)),
        "a red circle, a red circle and two blue squares": Caption((red, red, blue)),
        "a small red circle at the top left": Caption((Item(1, "red", "circle", "small", "top left"),)),
        "a red circle in the center": Caption((Item(1, "red", "circle", None, "center"),)),
        "a red circle left of a white triangle": Caption((red, Item(1, "white", "triangle")), "left of"),
        "nine grey triangles": Caption((Item(9, "grey", "triangle"),)),
    }.items():
        assert str(caption) == text and parse(text) == caption
    assert parse(" One RED circle ,and two  blue squares. ") == Caption((red, blue))


def test_every_caption_can_be_read():
    for count, size, colour, shape, place in itertools.product(
        (1, 2, 9), (None, "large"), COLOUR_NAMES, SHAPES, (None, *PLACES)
    ):
        item = Item(count, colour, shape, size, place)
        assert parse(str(item)) == Caption((item,))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a red elephant", "elephant"),
        ("the red circle", "the"),
        ("a tiny circle", "tiny"),
        ("a red circle on the roof", "on"),
        ("a red circle a blue square", "a"),
        ("two red circle", "circle"),
        ("a red circle left of a blue square and a red circle", "and"),
        ("a red", "ends too early"),
        ("", "ends too early"),
        ("two red circles above a blue square", "above"),
    ],
)
def test_what_cannot_be_read_is_refused(text, word):
    with refused("prompt") as caught:
        parse(text)
    reason = str(caught.value).removeprefix(f"prompt: {text!r}")
    assert word in reason and "\n" not in reason and len(reason) < len(str(caught.value))


def test_relations_are_those_of_the_grid():
    top_left, right = (Thing("small", "red", "circle", place) for place in ("top left", "right"))
    assert holds("left of", top_left, right) and holds("above", top_left, right)
    assert holds("right of", right, top_left) and holds("below", right, top_left)
    assert not any(holds(relation, right, top_left) for relation in ("left of", "above"))
    assert not any(holds(relation, right, right) for relation in ("left of", "right of", "above", "below"))


def test_captions_are_varied_and_depend_on_the_index_alone():
    source = shapes(captions="varied", seed=3)
    kinds = Counter()
    for index in range(300):
        text, things = source[index]["caption"], source.things(index)
        assert shapes(captions="varied", seed=3, length=300)[index]["caption"] == text
        caption = parse(text)
        is_full = all(item.size and item.place for item in caption.items)
        kinds[len(things), caption.relation is not None, is_full, caption.items[0].place is not None] += 1
        if is_full:
            assert text == Shapes.caption(things)
    # With two things a fourth kind of caption is possible; all are equally likely.
    assert sorted(kinds) == sorted(
        [(num, False, *said) for num in (1, 2, 3) for said in ((True, True), (False, True), (False, False))]
        + [(2, True, False, False)]
    )
    assert all(abs(count - 100 / (4 if num == 2 else 3)) < 20 for (num, *_), count in kinds.items())
    assert len({parse(source[index]["caption"]).relation for index in range(300)}) == 5


def test_images_do_not_depend_on_captions():
    for captions in (True, "full", "varied"):
        source = shapes(captions=captions)
        assert source.spec.captions and (source[4]["x"] == shapes()[4]["x"]).all()
        assert captions == "varied" or source[4]["caption"] == Shapes.caption(source.things(4))


def test_seen_and_unseen_combinations_are_disjoint():
    pairs = set(itertools.product(COLOUR_NAMES, SHAPES))
    assert len(UNSEEN) == len(pairs) / 6 and pairs > UNSEEN
    for words in zip(*pairs, strict=True):  # every colour and every shape is seen
        assert all(any(word in pair for pair in pairs - UNSEEN) for word in words)
    seen, unseen = shapes(combinations="seen"), shapes(combinations="unseen")
    kinds = {
        source: [{(thing.colour, thing.shape) for thing in source.things(index)} for index in range(600)]
        for source in (seen, unseen)
    }
    assert set().union(*kinds[seen]) == pairs - UNSEEN
    assert all(kind & UNSEEN for kind in kinds[unseen]) and set().union(*kinds[unseen]) == pairs
    for source, other in ((seen, unseen), (unseen, seen)):
        for index in range(20):
            things = frozenset(source.things(index))
            assert source.draws(things) and not other.draws(things) and shapes().draws(things)
