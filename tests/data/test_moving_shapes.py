"""Videos of moving shapes: what is drawn, its captions, and reading the shapes back from pixels."""

import itertools

import numpy as np
import pytest

from diffusion.core.build import build
from diffusion.data.sources.moving_shapes import LANES, MOTIONS, STILL, Mover, MovingShapes
from tests.data.shape_sets import digest, examples, parse, share_read
from tests.refusals import refused
from tests.tiers import slow_except

GOLDEN = "ec123f717df3e183dc48188a2a314a0b24dd492fe501edc32786ddcc06489f75"

COLOURS = ("red", "green", "blue", "yellow", "magenta", "cyan", "white", "grey")
THINGS = {
    Mover(*words)
    for direction in LANES
    for words in itertools.product(("small", "large"), COLOURS, ("circle", "square", "triangle"), LANES[direction],
                                   MOTIONS[direction])
}  # fmt: skip
PHRASES = {MovingShapes.phrase(thing): thing for thing in THINGS}


def videos(**keywords):
    return build("data", {"name": "moving_shapes", **keywords})


@pytest.mark.parametrize(("size", "frames"), [(32, 8), (64, 3)])
def test_examples(size, frames):
    source = videos(size=size, frames=frames)
    assert source.spec.shape == (frames, size, size, 3)
    example = source[5]
    assert set(example) == {"x", "cond"} and example["cond"] == {}
    x, _ = examples(source, 50)
    assert x.shape == (50, frames, size, size, 3) and x.dtype == np.float32
    assert x.min() == -1 and x.max() == 1


def test_videos_do_not_change():
    assert digest(videos(captions=True)) == GOLDEN


def test_an_example_depends_on_its_index_alone():
    first, again = videos(seed=3), videos(seed=3)
    for index in (49, 7, 7, 0):
        np.testing.assert_array_equal(first[index]["x"], again[index]["x"])
    x, _ = examples(first, 100)
    for other in (videos(seed=4), videos(seed=3, split="test")):
        assert (x == examples(other, 100)[0]).all(axis=(1, 2, 3, 4)).mean() < 0.05


def test_every_choice_occurs():
    source = videos()
    drawn = [source.things(index) for index in range(3000)]
    counts = np.bincount([len(things) for things in drawn])
    assert counts[0] == 0 and len(counts) == 4 and abs(counts[1:] / 3000 - 1 / 3).max() < 0.04
    for fields in (("size", "shape", "motion"), ("colour", "shape"), ("lane", "motion")):
        words = [{tuple(getattr(thing, field) for field in fields) for thing in those}
                 for those in (itertools.chain(*drawn), THINGS)]  # fmt: skip
        assert words[0] == words[1]
    assert all(source.draws(frozenset(things)) for things in drawn)
    vertical = [any("down" in thing.motion or "up" in thing.motion for thing in things) for things in drawn]
    assert abs(np.mean(vertical) - 0.5) < 0.05


def center(frame):
    """Returns the center of brightness in pixels: row, column."""
    weight = (frame + 1).sum(axis=-1)
    return np.array([(weight.sum(axis=1 - axis) * np.arange(len(weight))).sum() for axis in (0, 1)]) / weight.sum()


def test_motion_has_constant_speed_from_end_to_end():
    source = videos(max_things=1)
    steps = {"moving right": (0, 1), "moving left": (0, -1), "moving down": (1, 0), "moving up": (-1, 0)}
    seen = set()
    for index in range(60):
        (thing,) = source.things(index)
        seen.add(thing.motion)
        x = source[index]["x"]
        length = 32 - (8 if thing.size == "large" else 6)
        path = np.diff([center(frame) for frame in x], axis=0)
        np.testing.assert_allclose(path, np.tile(np.array(steps[thing.motion]) * length / 7, (7, 1)), atol=0.13)
        axis = 1 if steps[thing.motion][1] else 0
        ends = [np.nonzero((frame > -1).any(axis=(1 - axis, 2)))[0] for frame in (x[0], x[-1])]
        assert min(map(min, ends)) <= 1 and max(map(max, ends)) >= 30
    assert seen == set(steps)


def test_shapes_stay_upright_and_in_their_lanes():
    source = videos(max_things=1)
    for index in range(100):
        (thing,) = source.things(index)
        rows = thing.motion in ("moving left", "moving right")
        start = {"top": 1, "left": 1, "middle": 11, "bottom": 21, "right": 21}[thing.lane]
        bright = np.nonzero((source[index]["x"] > -1).any(axis=(0, 2 if rows else 1, 3)))[0]
        assert start <= bright.min() and bright.max() < start + 10
        if thing.shape == "triangle":
            rows_of_it = (source[index]["x"][0] + 1).sum(axis=(1, 2))
            rows_of_it = rows_of_it[rows_of_it > 0]
            assert rows_of_it[0] < rows_of_it[-2] / 2  # the tip points up


def test_still_things_do_not_move():
    source = videos()
    still = 0
    for index in range(100):
        x, things = source[index]["x"], source.things(index)
        for thing in things:
            if thing.motion == STILL and thing.lane in ("top", "bottom"):
                lane = x[:, 1:11] if thing.lane == "top" else x[:, 21:31]
                assert (lane == lane[0]).all() and lane.max() > -1
                still += 1
    assert still > 10


def test_captions():
    source = videos(captions=True)
    assert source.spec.captions
    things = (
        Mover("small", "red", "circle", "top", "moving right"),
        Mover("large", "blue", "square", "bottom", STILL),
    )
    text = "a small red circle at the top moving right and a large blue square at the bottom standing still"
    assert source.caption(things) == text and parse(text, PHRASES) == frozenset(things)
    for index in range(1000):
        caption = source[index]["caption"]
        assert caption == source.caption(source.things(index))
        assert parse(caption, PHRASES) == frozenset(source.things(index))


READ = [(32, 8, 1000), (32, 2, 300), (64, 8, 100)]


@pytest.mark.parametrize(("size", "frames", "num"), slow_except([(32, 2, 300)], READ))
def test_videos_are_read_back(size, frames, num):
    """Checks exact videos, videos rounded to 8 bits, and noise with standard deviations of 0.1 and 0.3."""
    source = videos(size=size, frames=frames)
    x, truth = examples(source, num)
    found, nearest = source.closest(x)
    assert found == truth
    np.testing.assert_array_equal(nearest, x)
    assert source.read(x[7]) == truth[7]
    x, truth = x[:300], truth[:300]
    assert share_read(source, np.round((x + 1) * 127.5) / 127.5 - 1, truth) == 1
    noise = np.random.default_rng(0).normal(size=x.shape)
    assert share_read(source, x + 0.1 * noise, truth) == 1
    assert share_read(source, x + 0.3 * noise, truth) >= 0.99


def test_no_video_is_nearer_than_the_one_found():
    """Checks that a blend of two videos is at least as near to the video found as to either of the two."""
    source = videos()
    x, _ = examples(source, 300)
    blend = 0.55 * x + 0.45 * x[::-1]
    _, nearest = source.closest(blend)
    errors = [((blend - other) ** 2).sum(axis=(1, 2, 3, 4)) for other in (nearest, x, x[::-1])]
    assert (errors[0] <= np.minimum(errors[1], errors[2]) + 1e-2).all()


def test_every_thing_has_a_separate_phrase():
    # A still thing in the middle lane belongs to both rows and columns.
    assert len(PHRASES) == len(THINGS) == 2 * 8 * 3 * (9 + 9 - 1)


def test_black_contains_nothing():
    source = videos()
    assert source.read(np.full((8, 32, 32, 3), -1.0)) == frozenset()
    found, nearest = source.closest(np.zeros((0, 8, 32, 32, 3)))
    assert found == [] and nearest.shape == (0, 8, 32, 32, 3)


def test_which_videos_the_source_draws():
    source = videos(max_things=2)
    right = Mover("large", "red", "circle", "top", "moving right")
    still = Mover("large", "red", "circle", "middle", STILL)
    bottom, up = (
        Mover("small", "red", "circle", "bottom", "moving left"),
        Mover("small", "red", "circle", "left", "moving up"),
    )
    assert source.draws(frozenset({right})) and source.draws(frozenset({right, still}))
    impossible = Mover("small", "red", "circle", "top", "moving up")
    for things in ((), (still,), (right, up), (right, still, bottom), (impossible,)):
        assert not source.draws(frozenset(things))


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"size": 16}, "size"),
        ({"frames": 1}, "frames"),
        ({"max_things": 4}, "max_things"),
        ({"max_things": 0}, "max_things"),
        ({"seed": -1}, "seed"),
        ({"length": 0}, "length"),
    ],
)
def test_bad_options(keywords, field):
    with refused(f"data.{field}"):
        videos(**keywords)
