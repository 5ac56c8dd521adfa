import math

import pytest

from diffusion.core.types import InputError
from launch import vary

ONE, TWO = vary.over("a", [1, 2]), vary.over("b.c", ["x", "y"])


def test_product_has_every_combination_the_last_fastest():
    assert vary.product(ONE, TWO) == [{"a": 1, "b.c": "x"}, {"a": 1, "b.c": "y"}, {"a": 2, "b.c": "x"},
                                      {"a": 2, "b.c": "y"}]  # fmt: skip
    assert vary.product() == [{}]


def test_zip_goes_along_all_parts():
    assert vary.zip(ONE, TWO) == [{"a": 1, "b.c": "x"}, {"a": 2, "b.c": "y"}]
    with pytest.raises(InputError, match=r"vary.zip: the parts must be of one length, got 2, 3"):
        vary.zip(ONE, vary.over("b", [1, 2, 3]))


def test_chain_is_one_after_the_other():
    assert vary.chain(ONE, TWO) == [*ONE, *TWO]


def test_one_field_is_varied_once():
    with pytest.raises(InputError, match=r"^a: is varied by two parts"):
        vary.product(ONE, ONE)


def test_random_points_are_those_of_the_seed():
    laws = {"a": vary.uniform(0, 1), "b": vary.log_uniform(1e-4, 1e-2), "c": vary.choice("x", "y")}
    points = vary.random(200, 0, **laws)
    assert points == vary.random(300, 0, **laws)[:200] != vary.random(200, 1, **laws)
    assert [point["a"] for point in points] == [point["a"] for point in vary.random(200, 0, a=laws["a"])]
    assert all(0 <= point["a"] <= 1 and 1e-4 <= point["b"] <= 1e-2 for point in points)
    assert abs(sum(math.log10(point["b"]) for point in points) / 200 + 3) < 0.15
    assert {point["c"] for point in points} == {"x", "y"}
    with pytest.raises(InputError, match=r"vary.log_uniform: wants 0 < low <= high, got 0 and 1"):
        vary.log_uniform(0, 1)
