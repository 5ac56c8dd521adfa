"""Markdown tables that jobs write into a file of the docs, between its lines `<!-- table -->` and
`<!-- end of table -->`."""

import os
from collections.abc import Iterable, Sequence

from diffusion.core import files
from diffusion.core.types import InputError

BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def around(path: str, field: str) -> tuple[str, str]:
    """What stands in the file before and after its tables, the two lines included. Raises InputError naming `field` if
    there is no such file, it lacks a line, or nothing can be written beside it."""
    if not os.path.isfile(path):
        raise InputError(field, f"no file {path}; it must have the lines {BEGIN} and {END}")
    with open(path, encoding="utf-8") as file:
        head, begin, rest = file.read().partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise InputError(field, f"{path} lacks the lines {BEGIN} and {END}")
    files.make_folder(os.path.dirname(path) or ".", field)
    return head + begin, end + tail


def insert(path: str, tables: Iterable[str], field: str) -> None:
    """Puts tables in the place of those that the file has."""
    head, tail = around(path, field)
    with files.replace(path) as file:
        file.write("\n\n".join([head, *tables, tail]))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
