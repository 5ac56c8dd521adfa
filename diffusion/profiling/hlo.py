"""What a compiled program sends between devices, read from its text: XLA's own analysis says nothing of it."""

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
    """One operation between devices.

    Attributes:
      kind: one of `KINDS`.
      arrays: what it works on, as HLO writes types.
      sent: bytes that each device sends in one run: of n devices' rings, (n - 1) / n of the whole array for a gather, a
        scatter and an exchange, twice that for an all-reduce.
      group: n.
      runs: in one run of the program, with loops taken as often as they go round.
    """

    kind: str
    arrays: str
    sent: float
    group: int
    runs: int


def collectives(text: str, devices: int) -> list[Collective]:
    """The operations between the devices of `compiled.as_text()`.

    A TPU's compiler writes a reduce-scatter as a fusion of an all-reduce and a slice, and an operation that goes on
    beside others as many fusions, each with the operation in it, of one channel: it counts once. Of a condition's
    branches all count.

    Raises:
      InputError: there is a loop with such an operation, and the text does not tell its number of rounds.
    """
    bodies, entry = _computations(text)

    @functools.cache
    def inside(name: str) -> tuple[tuple[str, Collective], ...]:
        """Those of a computation and of what it calls, each with what tells it from others."""
        found = {}
        for number, line in enumerate(bodies.get(name, ())):
            loop, operation = LOOP.search(line), OPERATION.search(line)
            if loop:
                rounds = _rounds(line, bodies.get(loop[1], []))
                for key, one in inside(loop[2]):
                    if rounds is None:
                        problem = f"its step has a {one.kind} in the loop {loop[2]}, whose number of rounds is not told"
                        raise InputError("config", f"{problem} by the compiler: what it sends cannot be counted")
                    found[name, number, key] = dataclasses.replace(one, runs=one.runs * rounds)
            elif operation:
                channel = re.search(r"channel_id=(\d+)", line)
                found[channel[1] if channel else (name, number)] = _collective(operation, line, name, devices)
            else:
                for callee in _called(line):
                    found.update(inside(callee))
        return tuple(found.items())

    return [one for _, one in inside(entry) if one.sent]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and which is the program's."""
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
    for one, several in CALLED.findall(line):
        yield from (name.strip().lstrip("%") for name in (one or several).split(","))


def _rounds(line: str, condition: list[str]) -> int | None:
    """How often a loop runs: as the compiler knows, or where it counts from 0 to a constant, as a scan does."""
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
    if started and kind != "all-reduce":  # a tuple of operands, results and counters
        sizes = [max(sizes)]
    group = _group(line, devices)
    whole = sum(sizes)
    if kind == "reduce-scatter":
        whole *= group  # its result is a part
    elif kind == "all-reduce" and "all-reduce-scatter" in computation:
        kind = "reduce-scatter"
    times = {"all-reduce": 2 * (group - 1) / group, "collective-permute": 1, "collective-broadcast": 1}
    arrays = ", ".join(f"{dtype}[{shape}]" for dtype, shape in ARRAY.findall(types))
    return Collective(kind, arrays, whole * times.get(kind, (group - 1) / group), group, 1)


def _width(dtype: str) -> float:
    """Bytes of an element."""
    if dtype == "pred":
        return 1
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) / 8 if bits else 0


def _group(line: str, devices: int) -> int:
    """How many devices work together, in each of the ways that HLO writes groups: one by one, as rows of a table, as
    axes of a mesh."""
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
