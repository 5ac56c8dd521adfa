"""Reads a compiled program's collective operations from its HLO text, because XLA's cost analysis omits them."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from diffusion.core.types import InputError

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
OPERATION = re.compile(rf" = (.*?) ({'|'.join(KINDS)})(-start)?\(")
CALLED = re.compile(
    r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
LOOP = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
ARRAY = re.compile(r"\b([a-z]+\d*(?:e\d+m\d+\w*)?)\[([\d,]*)\]")
TRIPS = re.compile(r"known_trip_count\D*(\d+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective operation.

    Attributes:
      kind: One of `KINDS`.
      arrays: Types of the arrays, in HLO's notation.
      sent: Bytes that each device sends per run. In a ring of n devices it is (n - 1) / n of the whole array for an
        all-gather, reduce-scatter or all-to-all, and twice that for an all-reduce.
      group: Number of devices n that communicate with each other.
      runs: Number of runs per run of the program, counting each iteration of a loop.
    """

    kind: str
    arrays: str
    sent: float
    group: int
    runs: int


def collectives(text: str, devices: int) -> list[Collective]:
    """Returns the collective operations of a program.

    The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice. It writes an asynchronous
    operation as several fusions that each contain the operation with the same channel; such an operation counts once.
    All branches of a conditional count.

    Args:
      text: The result of `compiled.as_text()`.
      devices: Number of devices of the program.

    Raises:
      InputError: A loop contains a collective operation, and its number of iterations cannot be determined.
    """
    bodies, entry = _computations(text)

    @functools.cache
    def inside(name: str) -> tuple[tuple[str, Collective], ...]:
        """Returns the operations of a computation and of those that it calls, each with a key that identifies it."""
        found = {}
        for number, line in enumerate(bodies.get(name, ())):
            loop, operation = LOOP.search(line), OPERATION.search(line)
            if loop:
                trips = _trip_count(line, bodies.get(loop[1], []))
                for key, one in inside(loop[2]):
                    if trips is None:
                        problem = f"its step has {one.kind} operations in the loop {loop[2]} of unknown length"
                        raise InputError("config", f"{problem}, so the bytes sent cannot be counted")
                    found[name, number, key] = dataclasses.replace(one, runs=one.runs * trips)
            elif operation:
                channel = re.search(r"channel_id=(\d+)", line)
                found[channel[1] if channel else (name, number)] = _collective(operation, line, name, devices)
            else:
                for callee in _called(line):
                    found.update(inside(callee))
        return tuple(found.items())

    return [one for _, one in inside(entry) if one.sent]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation by its name, and the name of the entry computation."""
    bodies, entry, lines = {}, "", []
    for line in text.splitlines():
        head = None if line.startswith(" ") else COMPUTATION.match(line)
        if head:
            lines = bodies[head[2]] = []
            entry = head[2] if head[1] else entry
        elif line.startswith(" "):
            lines.append(line)
    return bodies, entry


def _called(line: str) -> Iterator[str]:
    """Yields the names of the computations that a line calls."""
    for one, several in CALLED.findall(line):
        yield from (name.strip().lstrip("%") for name in (one or several).split(","))


def _trip_count(line: str, condition: list[str]) -> int | None:
    """Returns the number of iterations of a loop if the compiler states it or the loop counts from 0 to a constant."""
    known = TRIPS.search(line)
    if known:
        return int(known[1])
    limits = [int(number) for one in condition for number in re.findall(r"\b[su]32\[\]\S* constant\((\d+)\)", one)]
    counts = any("direction=LT" in one for one in condition)
    return limits[0] if counts and len(limits) == 1 else None


def _collective(operation: re.Match, line: str, computation: str, devices: int) -> Collective:
    types, kind, started = operation.groups()
    sizes = [
        math.prod(map(int, filter(None, shape.split(",")))) * _width(dtype) for dtype, shape in ARRAY.findall(types)
    ]
    if started and kind != "all-reduce":  # the type is a tuple of operands, results and counters
        sizes = [max(sizes)]
    group = _group(line, devices)
    whole = sum(sizes)
    if kind == "reduce-scatter":
        whole *= group  # its result is one of the parts
    elif kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"
    times = {"all-reduce": 2 * (group - 1) / group, "collective-permute": 1, "collective-broadcast": 1}
    arrays = ", ".join(f"{dtype}[{shape}]" for dtype, shape in ARRAY.findall(types))
    return Collective(kind, arrays, whole * times.get(kind, (group - 1) / group), group, 1)


def _width(dtype: str) -> float:
    """Returns the size of an element in bytes."""
    if dtype == "pred":
        return 1
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0


def _group(line: str, devices: int) -> int:
    """Returns the number of devices per group, for each of HLO's notations: lists, rows of a table, axes of a mesh."""
    rows = re.search(r"replica_groups=\[(\d+),(\d+)\]<=", line)
    if rows:
        return int(rows[2])
    axes = re.search(r"replica_groups=@?\w*\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if axes:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", axes[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", axes[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    return listed[1].count(",") + 1 if listed else devices
