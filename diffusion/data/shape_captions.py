"""Captions of coloured shapes: several true ones of each picture, and a parser that reads them.

caption  = item, {", ", item}, [" and ", item] | item, relation, item
item     = count, [size], colour, shape, [place]
count    = "a" | "one" | "two" | ... | "nine"; after "two" and more, the shape has an "s"
relation = "left of" | "right of" | "above" | "below"
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion.core.types import InputError
from diffusion.data.geometry import COLOUR_NAMES, RADII, SHAPES

# The cells of the grid, row by row.
PLACES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "center": "in the center",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
COUNTS = ("a", "two", "three", "four", "five", "six", "seven", "eight", "nine")  # 1 to 9
# Whether things at (row, column) of the grid are in a relation.
RELATIONS: dict[str, Callable[[tuple[int, int], tuple[int, int]], bool]] = {
    "left of": lambda first, second: first[1] < second[1],
    "right of": lambda first, second: first[1] > second[1],
    "above": lambda first, second: first[0] < second[0],
    "below": lambda first, second: first[0] > second[0],
}

Thing = Any  # has the attributes `size`, `colour`, `shape` and `place`, all words
# One in six pairs of a colour and a shape. Every colour and every shape also occurs in other pairs.
UNSEEN = frozenset({("red", "square"), ("green", "triangle"), ("blue", "circle"), ("yellow", "triangle")})


@dataclass(frozen=True)
class Item:
    """What a caption says of one or several things of a kind; None stands for what it does not say."""

    count: int
    colour: str
    shape: str
    size: str | None = None
    place: str | None = None

    def __str__(self):
        plural = "s" if self.count > 1 else ""
        words = (COUNTS[self.count - 1], self.size, self.colour, self.shape + plural, self.place and PLACES[self.place])
        return " ".join(filter(None, words))

    def fits(self, thing: Thing) -> bool:
        """Returns whether all that the caption says is true of a thing."""
        return all(
            said in (None, getattr(thing, name))
            for name, said in vars(self).items()
            if name != "count"
        )  # fmt: skip


@dataclass(frozen=True)
class Caption:
    """A caption: its items, and the relation of the first to the second, or None."""

    items: tuple[Item, ...]
    relation: str | None = None

    def __str__(self):
        if self.relation:
            return f" {self.relation} ".join(map(str, self.items))
        *others, last = map(str, self.items)
        return f"{', '.join(others)} and {last}" if others else last


def holds(relation: str, first: Thing, second: Thing) -> bool:
    """Returns whether a thing is in a relation of RELATIONS to another."""
    return RELATIONS[relation](*(divmod(list(PLACES).index(thing.place), 3) for thing in (first, second)))


def varied(things: Sequence[Thing], randbelow: Callable[[int], int]) -> Caption:
    """Returns one of several true captions of a picture.

    It says everything, or leaves out the sizes, or says only how many shapes there are of each kind and colour, or, for
    two things, how one lies to the other. `randbelow(n)` draws integers in [0, n).
    """
    kind = randbelow(4 if len(things) == 2 else 3)
    if kind == 0:
        return Caption(tuple(Item(1, thing.colour, thing.shape, thing.size, thing.place) for thing in things))
    if kind == 1:
        return Caption(tuple(Item(1, thing.colour, thing.shape, place=thing.place) for thing in things))
    if kind == 2:
        counts = Counter((thing.colour, thing.shape) for thing in things)
        return Caption(tuple(Item(count, *words) for words, count in counts.items()))
    relations = [relation for relation in RELATIONS if holds(relation, *things)]
    items = tuple(Item(1, thing.colour, thing.shape) for thing in things)
    return Caption(items, relations[randbelow(len(relations))])


def parse(text: str) -> Caption:
    """Returns what a caption says.

    Raises:
      InputError: The text is not in the grammar of the module; the error names the word.
    """
    words = text.lower().rstrip(" .").replace(",", " , ").split()

    def take(options: dict[str, Any]) -> Any:
        """Removes the longest option that the rest starts with, and returns its value, or None."""
        for option in sorted(options, key=len, reverse=True):
            if words[: len(option.split())] == option.split():
                del words[: len(option.split())]
                return options[option]
        return None

    def refuse(expected: str) -> InputError:
        found = f"cannot read {words[0]!r}" if words else "it ends too early"
        return InputError("prompt", f"{text!r}: {found}; expected {expected}")

    def required(options: dict[str, Any], name: str) -> Any:
        found = take(options)
        if found is None:
            raise refuse(f"a {name}: {', '.join(options)}")
        return found

    def item() -> Item:
        count = required({word: number for number, word in enumerate(COUNTS, 1)} | {"one": 1}, "number")
        size = take({word: word for word in RADII})
        colour = required({word: word for word in COLOUR_NAMES}, "colour" if size else "size or a colour")
        shape = required({word + "s" * (count > 1): word for word in SHAPES}, "shape")
        return Item(count, colour, shape, size, take({phrase: place for place, phrase in PLACES.items()}))

    items = [item()]
    relation = take({word: word for word in RELATIONS})
    if relation:
        items.append(item())
    while not relation and take({", and": True, ",": True, "and": True}):
        items.append(item())
    if words:
        raise refuse("the end" if relation else "a place, a relation, a comma, 'and' or the end")
    if relation and any(item.count > 1 for item in items):
        raise InputError("prompt", f"{text!r} has {relation!r} between several shapes; name one on each side")
    return Caption(tuple(items), relation)
