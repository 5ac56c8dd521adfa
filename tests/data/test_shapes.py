"""Images of shapes: what is drawn, its captions, and reading the shapes back from pixels."""

import itertools
import pickle

import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.data.pipeline import Batches
from diffusion.data.sources.shapes import PLACES, Shapes, Thing
from tests.data.shape_sets import digest, examples, parse, share_read
from tests.refusals import refused
from tests.tiers import slow_except

SIZES = (32, 64)
GOLDEN = "bdb0d3fe63ede84ce7f7dda45a04f5dd6c594d11d53b2f3fd923f3d7f5c6365b"

COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "white", "grey")
THINGS = [Thing(*words) for words in itertools.product(("small", "large"), COLOURS, ("circle", "square", "triangle"),
                                                       PLACES)]  # fmt: skip
PHRASES = {Shapes.phrase(thing): thing for thing in THINGS}


def shapes(**keywords):
    return build("data", {"name": "shapes", **keywords})


@pytest.mark.parametrize("size", SIZES)
def test_examples(size):
    source = shapes(size=size)
    assert source.spec.shape == (size, size, 3)
    assert source.spec.is_image and not source.spec.captions
    example = source[np.int64(5)]
    assert set(example) == {"x", "cond"} and example["cond"] == {}
    images, _ = examples(source, 200)
    assert images.shape == (200, size, size, 3) and images.dtype == np.float32
    assert images.min() == -1 and images.max() == 1
    edges = (abs(images) < 1).any(axis=-1).mean(axis=(1, 2))
    assert 0 < edges.mean() < 0.1


def test_images_do_not_change():
    assert digest(shapes(captions=True)) == GOLDEN


def test_an_example_depends_on_its_index_alone():
    first, again = shapes(seed=3), shapes(seed=3, length=50)
    for index in (49, 7, 7, 0):
        np.testing.assert_array_equal(first[index]["x"], again[index]["x"])
    x, _ = examples(first, 100)
    for other in (shapes(seed=4), shapes(seed=3, split="test")):
        equal = (x == examples(other, 100)[0]).all(axis=(1, 2, 3))
        assert equal.mean() < 0.05  # a few images with a single shape may coincide


def test_length():
    assert len(shapes()) == 2**31 - 1
    source = shapes(length=10)
    assert len(source) == 10
    for index in (-1, 10):
        with pytest.raises(IndexError):
            source[index]
        with pytest.raises(IndexError):
            source.things(index)


def test_the_pipeline_accepts_it():
    source = shapes(captions=True)
    stream = Batches(source, batch_size=8, seed=0)
    first, second = next(stream), next(stream)
    stream.close()
    assert first["x"].shape == (8, 32, 32, 3)
    assert len({image.tobytes() for batch in (first, second) for image in batch["x"]}) > 14
    found, _ = source.closest(first["x"])
    assert found == [parse(str(caption), PHRASES) for caption in first["caption"]]
    # Worker processes receive the source by pickle.
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
    # Every ordered pair of places occurs.
    assert len({tuple(thing.place for thing in things) for things in drawn if len(things) == 2}) == 72


@pytest.mark.parametrize("size", SIZES)
def test_things_lie_anywhere_in_their_cells(size):
    source, cell = shapes(size=size, max_things=1), 10 * size // 32
    corners = set()
    for index in range(6000):
        (thing,) = source.things(index)
        if (thing.size, thing.shape, thing.place) == ("large", "circle", "center"):
            rows, columns = np.nonzero((source[index]["x"] > -1).any(axis=-1))
            corners.add((rows.min(), columns.min()))
            start = 11 * size // 32
            assert min(rows.min(), columns.min()) >= start and max(rows.max(), columns.max()) < start + cell
    assert len(corners) == (2 * size // 32 + 1) ** 2


def test_up_to_nine_things():
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
        assert parse(caption, PHRASES) == frozenset(source.things(index))


def test_every_thing_has_a_separate_phrase():
    assert len(PHRASES) == len(THINGS) == 2 * 8 * 3 * 9
    assert all(parse(Shapes.caption([thing]), PHRASES) == {thing} for thing in THINGS)


@pytest.mark.parametrize("size", slow_except((32,), SIZES))
def test_images_are_read_back(size):
    """Checks exact images, images rounded to 8 bits, and noise with standard deviations of 0.1 and 0.3."""
    source = shapes(size=size)
    images, truth = examples(source, 2000)
    found, nearest = source.closest(images)
    assert found == truth
    np.testing.assert_array_equal(nearest, images)
    assert source.read(images[7]) == truth[7]
    images, truth = images[:1000], truth[:1000]
    assert share_read(source, np.round((images + 1) * 127.5) / 127.5 - 1, truth) == 1
    noise = np.random.default_rng(0).normal(size=images.shape)
    assert share_read(source, images + 0.1 * noise, truth) == 1
    assert share_read(source, images + 0.3 * noise, truth) >= 0.99


def test_every_template_is_distinguished_from_all_others():
    """Checks one cell with every shape of every size and colour at every position in it."""
    source = shapes()
    masks, colours = source._templates.masks, np.array([*np.ndindex(2, 2, 2), (0.5, 0.5, 0.5)], np.float32)[1:]
    cells = 2 * masks[:, None, :, :, None] * colours[:, None, None] - 1
    mask, colour, gain = source._templates.nearest(cells.reshape(-1, 10, 10, 3))
    np.testing.assert_array_equal(mask, np.arange(len(masks)).repeat(8))
    assert (colour.reshape(-1, 8) == colour[:8]).all() and len(set(colour[:8])) == 8
    np.testing.assert_allclose(gain, ((cells.reshape(-1, 300) + 1) ** 2).sum(axis=1), rtol=1e-5)


def test_which_images_the_source_draws():
    source = shapes(max_things=2)
    red, blue = Thing("large", "red", "circle", "top"), Thing("large", "blue", "circle", "top")
    white, grey = Thing("small", "white", "square", "left"), Thing("small", "grey", "square", "right")
    assert source.draws(frozenset({red})) and source.draws(frozenset({red, white}))
    for things in ((), (red, blue), (red, white, grey)):
        assert not source.draws(frozenset(things))


def test_black_contains_nothing():
    source = shapes()
    assert source.read(np.full((32, 32, 3), -1.0)) == frozenset()
    found, nearest = source.closest(np.zeros((0, 32, 32, 3)))
    assert found == [] and nearest.shape == (0, 32, 32, 3)


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
    with refused(f"data.{field}"):
        shapes(**keywords)
