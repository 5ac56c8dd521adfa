"""Inserts Markdown tables into a documentation file, between its lines `<!-- table -->` and `<!-- end of table -->`."""

import os
from collections.abc import Iterable, Sequence

from diffusion.core import files
from diffusion.core.types import InputError

BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def surroundings(path: str, field: str) -> tuple[str, str]:
    """Returns the text before and after the tables of a file, including the two marker lines.

    Raises:
      InputError: The file does not exist, lacks a marker, or its folder is not writable; the field is `field`.
    """
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
    """Replaces the tables of a file; see `surroundings` for the errors."""
    head, tail = surroundings(path, field)
    with files.replace(path) as file:
        file.write("\n\n".join([head, *tables, tail]))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; the cells are Markdown already."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])
