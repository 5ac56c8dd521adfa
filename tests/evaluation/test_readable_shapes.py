import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from diffusion.core.build import build
from tests.refusals import refused
from tests.streams import measured
from tests.tiers import slow_except


def metric_and_images(name, **keywords):
    source = build("data", {"name": name, **keywords})
    real = {"train": source, "held_out": build("data", {"name": name, "split": "test", **keywords})}
    x = np.stack([source[index]["x"] for index in range(300)])
    return build("evaluation", "readable_shapes", **real), x


@pytest.fixture(scope="module", params=slow_except(("shapes",), ("shapes", "moving_shapes")))
def case(request):
    return metric_and_images(request.param)


def noisy(x, std):
    return x + std * np.random.default_rng(0).normal(size=x.shape).astype(np.float32)


def test_the_data_are_readable(case):
    metric, x = case
    values = measured(metric, x)
    assert values["readable_shapes"] == 1 and values["shapes_off"] == 0
    assert values["shape_count_distance"] < 0.1
    values = measured(metric, noisy(x, 0.15))
    assert values["readable_shapes"] == 1 and abs(values["shapes_off"] - 0.16) < 0.01


def test_images_unlike_the_data_are_not_readable(case):
    metric, x = case
    assert measured(metric, noisy(x, 0.3))["readable_shapes"] == 0
    assert measured(metric, (x + x[::-1]) / 2)["readable_shapes"] < 0.1
    black = measured(metric, np.full_like(x, -1))
    assert (black["readable_shapes"], black["shape_count_distance"]) == (0, 1)
    assert measured(metric, np.full_like(x, np.nan))["readable_shapes"] == 0


def test_one_bad_ninth_is_enough(case):
    """Noise in one corner of the last frame makes a sample unreadable, although its mean error is small."""
    metric, x = case
    changed = x.copy()
    last = changed if x.ndim == 4 else changed[:, -1]
    last[:, 22:, 22:] = noisy(last, 0.4)[:, 22:, 22:]
    assert np.sqrt(((changed - x) ** 2).mean()) < 0.15
    assert measured(metric, changed)["readable_shapes"] < 0.05


def test_blurred_and_cut_shapes():
    metric, x = metric_and_images("shapes", max_things=1)
    assert measured(metric, gaussian_filter(x, (0, 0.5, 0.5, 0)))["readable_shapes"] > 0.99
    cut = x.copy()
    for image in cut:
        rows = np.nonzero((image > -1).any(axis=(1, 2)))[0]
        image[: (rows[0] + rows[-1] + 1) // 2] = -1
    assert measured(metric, cut)["readable_shapes"] < 0.35


def test_more_shapes_than_in_the_data_are_not_readable():
    metric, _ = metric_and_images("shapes")
    crowd = build("data", {"name": "shapes", "max_things": 9})
    x = np.stack([crowd[index]["x"] for index in range(300)])
    few = np.array([len(crowd.things(index)) <= 3 for index in range(300)])
    values = measured(metric, x)
    assert values["readable_shapes"] == few.mean() and abs(values["shape_count_distance"] - 2 / 3) < 0.1


def test_batches_do_not_matter():
    metric, x = metric_and_images("shapes")
    x = np.concatenate([noisy(x[:60], 0.3), x[60:], np.full_like(x[:100], -1)])
    values = measured(metric, x, batch_size=len(x))
    assert values["readable_shapes"] == 0.6 and values == measured(metric, x, batch_size=7)


@pytest.mark.parametrize(("options", "field"), [({"num": 0}, "num"), ({"limit": 0.0}, "limit")])
def test_bad_options(options, field):
    source = build("data", "shapes")
    with refused(f"evaluation.{field}"):
        build("evaluation", {"name": "readable_shapes", **options}, train=source, held_out=source)


def test_data_without_a_parser_are_refused(digits):
    with refused("evaluation.name"):
        build("evaluation", "readable_shapes", train=digits, held_out=digits)
