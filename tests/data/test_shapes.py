import hashlib
import itertools
import pickle

import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.core.types import InputError, Source
from diffusion.data.pipeline import Batches
from diffusion.data.sources.shapes import LOCATION_KEYWORDS, VOCABULARY, Thing

SIZES = (32, 64)
GOLDEN = "bdb0d3fe63ede84ce7f7dda45a04f5dd6c594d11d53b2f3fd923f3d7f5c6365b"


def shapes(**keywords):
    return build("data", {"name": "shapes", **keywords})


def examples(source, num):
    """Images `[num, H, W, 3]` and what is to be seen in them."""
    images = np.stack([source[index]["x"] for index in range(num)])
    return images, [frozenset(source.things(index)) for index in range(num)]


def share_read(source, images, truth):
    found, _ = source.closest(images.astype(np.float32))
    return np.mean([one == other for one, other in zip(found, truth, strict=True)])


@pytest.mark.parametrize("size", SIZES)
def test_examples(size):
    source = shapes(size=size)
    assert isinstance(source, Source) and source.spec.shape == (size, size, 3)
    assert source.spec.is_image and not source.spec.captions
    example = source[np.int64(5)]
    assert set(example) == {"x", "cond"} and example["cond"] == {}
    images, _ = examples(source, 200)
    assert images.shape == (200, size, size, 3) and images.dtype == np.float32
    assert images.min() == -1 and images.max() == 1
    edges = (abs(images) < 1).any(axis=-1).mean(axis=(1, 2))
    assert 0 < edges.mean() < 0.1


def test_the_pictures_do_not_change():
    source = shapes(captions=True)
    digest = hashlib.sha256()
    for index in range(100):
        example = source[index]
        digest.update(example["x"].astype("<f4").tobytes() + example["caption"].encode())
    assert digest.hexdigest() == GOLDEN


def test_an_example_follows_from_its_index_alone():
    first, again = shapes(seed=3), shapes(seed=3, length=50)
    for index in (49, 7, 7, 0):
        np.testing.assert_array_equal(first[index]["x"], again[index]["x"])
    x, _ = examples(first, 100)
    for other in (shapes(seed=4), shapes(seed=3, split="test")):
        equal = (x == examples(other, 100)[0]).all(axis=(1, 2, 3))
        assert equal.mean() < 0.05  # a few pictures of one shape may be the same


def test_length():
    assert len(shapes()) == 2**31 - 1
    source = shapes(length=10)
    assert len(source) == 10
    for index in (-1, 10):
        with pytest.raises(IndexError, match=f"10 examples, no number {index}"):
            source[index]
        with pytest.raises(IndexError):
            source.things(index)


def test_the_pipeline_takes_it():
    source = shapes(captions=True)
    stream = Batches(source, batch_size=8, seed=0)
    first, second = next(stream), next(stream)
    stream.close()
    assert first["x"].shape == (8, 32, 32, 3)
    assert len({image.tobytes() for batch in (first, second) for image in batch["x"]}) > 14
    found, _ = source.closest(first["x"])
    assert found == [source.parse_caption(str(caption)) for caption in first["caption"]]
    # Workers get it by pickle.
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[5]["x"], source[5]["x"])


def test_all_choices_are_equally_likely():
    source = shapes()
    drawn = [source.things(index) for index in range(3000)]
    counts = np.bincount([len(things) for things in drawn])
    assert counts[0] == 0 and len(counts) == 4 and abs(counts[1:] / 3000 - 1 / 3).max() < 0.04
    everything = [thing for things in drawn for thing in things]
    for field, number in (("size", 2), ("colour", 8), ("shape", 3), ("place", 9)):
        _, counts = np.unique([getattr(thing, field) for thing in everything], return_counts=True)
        assert len(counts) == number
        assert abs(counts * number / len(everything) - 1).max() < 0.2
    # No order is kept from.
    assert len({tuple(thing.place for thing in things) for things in drawn if len(things) == 2}) == 72


@pytest.mark.parametrize("size", SIZES)
def test_things_lie_anywhere_in_their_cells(size):
    source, cell = shapes(size=size, max_things=1), 10 * size // 32
    corners = {}
    for index in range(6000):
        (thing,) = source.things(index)
        if (thing.size, thing.shape, thing.place) == ("large", "circle", "center"):
            rows, columns = np.nonzero((source[index]["x"] > -1).any(axis=-1))
            corners.setdefault(thing.size, set()).add((rows.min(), columns.min()))
            start = 11 * size // 32
            assert min(rows.min(), columns.min()) >= start and max(rows.max(), columns.max()) < start + cell
    assert len(corners["large"]) == (2 * size // 32 + 1) ** 2


def test_more_things():
    source = shapes(max_things=9)
    images, truth = examples(source, 300)
    assert {len(things) for things in truth} == set(range(1, 10))
    assert share_read(source, images, truth) == 1


def test_captions():
    source = shapes(captions=True)
    assert source.spec.captions
    things = (
        Thing("large", "red", "circle", "top left"),
        Thing("small", "blue", "square", "center"),
        Thing("small", "white", "triangle", "right"),
    )
    one, two, three = (
        "a large red circle at the top left",
        "a small blue square in the center",
        "a small white triangle",
    )
    assert source.caption(things[:1]) == one
    assert source.caption(things[:2]) == f"{one} and {two}"
    assert source.caption(things) == f"{one}, {two} and {three} on the right"
    for index in range(1000):
        caption = source[index]["caption"]
        assert caption == source.caption(source.things(index))
        assert source.parse_caption(caption) == frozenset(source.things(index))


def test_every_phrase_is_read_back():
    sizes, shapes_of = ("small", "large"), ("circle", "square", "triangle")
    colours = ("red", "green", "blue", "yellow", "magenta", "cyan", "white", "grey")
    everything = {Thing(*words) for words in itertools.product(sizes, colours, shapes_of, LOCATION_KEYWORDS)}
    assert len(everything) == 2 * 8 * 3 * 9
    for thing in everything:
        assert VOCABULARY.parse(VOCABULARY.caption([thing])) == {thing}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "a large red circle",
        "A large red circle at the top",
        "a large red circle at the top.",
        "a large red circle at the top and a small blue square at the top",  # one cell
        "a large red circle at the top, a small blue square on the left",  # no "and"
        "a large red circle at the top and a small blue square on the left and a small red square on the right",
    ],
)
def test_other_text_is_no_caption(text):
    with pytest.raises(ValueError, match="caption"):
        VOCABULARY.parse(text)


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_read_back(size):
    """Exactly; from 8 bits; and under noise of a twentieth of the range."""
    source = shapes(size=size)
    images, truth = examples(source, 2000)
    found, pictures = source.closest(images)
    assert found == truth
    np.testing.assert_array_equal(pictures, images)
    assert source.read(images[7]) == truth[7]
    images, truth = images[:1000], truth[:1000]
    assert share_read(source, np.round((images + 1) * 127.5) / 127.5 - 1, truth) == 1
    noise = np.random.default_rng(0).normal(size=images.shape)
    assert share_read(source, images + 0.1 * noise, truth) == 1
    assert share_read(source, images + 0.3 * noise, truth) >= 0.99


def test_every_template_is_told_from_all_others():
    """In one cell: every shape of every size and colour, at every place in it."""
    source = shapes()
    masks, colours = source._templates.masks, np.array([*np.ndindex(2, 2, 2), (0.5, 0.5, 0.5)], np.float32)[1:]
    cells = 2 * masks[:, None, :, :, None] * colours[:, None, None] - 1
    mask, colour, gain = source._templates.nearest(cells.reshape(-1, 10, 10, 3))
    np.testing.assert_array_equal(mask, np.arange(len(masks)).repeat(8))
    assert (colour.reshape(-1, 8) == colour[:8]).all() and len(set(colour[:8])) == 8
    np.testing.assert_allclose(gain, ((cells.reshape(-1, 300) + 1) ** 2).sum(axis=1), rtol=1e-5)


def test_what_the_set_draws():
    source = shapes(max_things=2)
    red, blue = Thing("large", "red", "circle", "top"), Thing("large", "blue", "circle", "top")
    white, grey = Thing("small", "white", "square", "left"), Thing("small", "grey", "square", "right")
    assert source.draws(frozenset({red})) and source.draws(frozenset({red, white}))
    for things in ((), (red, blue), (red, white, grey)):
        assert not source.draws(frozenset(things))


def test_black_has_nothing_in_it():
    source = shapes()
    assert source.read(np.full((32, 32, 3), -1.0)) == frozenset()
    found, pictures = source.closest(np.zeros((0, 32, 32, 3)))
    assert found == [] and pictures.shape == (0, 32, 32, 3)


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"size": 48}, "size"),
        ({"max_things": 0}, "max_things"),
        ({"max_things": 10}, "max_things"),
        ({"split": "valid"}, "split"),
        ({"seed": -1}, "seed"),
        ({"length": 0}, "length"),
        ({"length": 2**63}, "length"),
    ],
)
def test_bad_options(keywords, field):
    with pytest.raises(InputError, match=f"data.{field}: "):
        shapes(**keywords)
