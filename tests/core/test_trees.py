"""Parts of parameter trees by their paths."""

import pytest

from diffusion.core import trees
from tests.refusals import refused

TREE = {"net": {"a": {"kernel": 1, "bias": 2}, "b": {"kernel": 3}}, "critic": {"kernel": 4}}


@pytest.mark.parametrize(
    ("patterns", "selected"),
    [
        (["^net/"], {"net": {"a": {"kernel": 1, "bias": 2}, "b": {"kernel": 3}}}),
        (["bias$", "critic"], {"net": {"a": {"bias": 2}}, "critic": {"kernel": 4}}),
        (["nothing"], {}),
        ([""], TREE),
    ],
)
def test_split_and_merge(patterns, selected):
    matching, rest = trees.split(TREE, trees.matcher(patterns, "field"))
    assert matching == selected and trees.merge(rest, matching) == TREE
    assert not trees.by_path(matching).keys() & trees.by_path(rest).keys()


def test_the_update_takes_precedence_and_nothing_else_changes():
    merged = trees.merge(TREE, {"net": {"b": {"kernel": 30, "bias": 5}}})
    assert merged["net"] == {"a": {"kernel": 1, "bias": 2}, "b": {"kernel": 30, "bias": 5}}
    assert TREE["net"]["b"] == {"kernel": 3}


def test_nest_is_the_inverse_of_by_path():
    assert trees.nest(trees.by_path(TREE)) == TREE


def test_an_invalid_expression():
    with refused("field"):
        trees.matcher(["net/("], "field")
