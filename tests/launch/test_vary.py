"""Combinations of sweep points."""

import math

from launch import vary
from tests.refusals import refused

ONE, TWO = vary.over("a", [1, 2]), vary.over("b.c", ["x", "y"])


def test_product_varies_the_last_part_fastest():
    assert vary.product(ONE, TWO) == [{"a": 1, "b.c": "x"}, {"a": 1, "b.c": "y"}, {"a": 2, "b.c": "x"},
                                      {"a": 2, "b.c": "y"}]  # fmt: skip
    assert vary.product() == [{}]


def test_zip_combines_points_at_the_same_position():
    assert vary.zip(ONE, TWO) == [{"a": 1, "b.c": "x"}, {"a": 2, "b.c": "y"}]
    with refused("vary.zip"):
        vary.zip(ONE, vary.over("b", [1, 2, 3]))


def test_chain_concatenates():
    assert vary.chain(ONE, TWO) == [*ONE, *TWO]


def test_field_varied_by_two_parts_is_refused():
    with refused("a"):
        vary.product(ONE, ONE)


def test_random_points_depend_only_on_the_seed():
    distributions = {"a": vary.uniform(0, 1), "b": vary.log_uniform(1e-4, 1e-2), "c": vary.choice("x", "y")}
    points = vary.random(200, 0, **distributions)
    assert points == vary.random(300, 0, **distributions)[:200] != vary.random(200, 1, **distributions)
    assert [point["a"] for point in points] == [point["a"] for point in vary.random(200, 0, a=distributions["a"])]
    assert all(0 <= point["a"] <= 1 and 1e-4 <= point["b"] <= 1e-2 for point in points)
    assert abs(sum(math.log10(point["b"]) for point in points) / 200 + 3) < 0.15
    assert {point["c"] for point in points} == {"x", "y"}
    with refused("vary.log_uniform"):
        vary.log_uniform(0, 1)
