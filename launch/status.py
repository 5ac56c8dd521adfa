"""Tells how far the runs of a sweep have come: on a terminal a table that is drawn again every few seconds until all
have ended, elsewhere one table.

python -m launch.status --workdir=runs/lr [--every=2]
"""

import shutil
import sys
import time
from collections.abc import Sequence
from typing import TextIO

from absl import flags

from diffusion.core.types import InputError
from experiments import cli
from launch.results import ENDED, STATES, Row, counts, labels, read

COLUMNS = ("run", "state", "step", "loss", "images/s", "left")
DROPPED = ("images/s", "left", "loss")  # in this order, where the terminal is narrow
NARROWEST = 16  # characters of a run's name that are left before a column is dropped
NOTES = 5  # errors shown below the table


def table(rows: Sequence[Row], width: int | None = None, height: int | None = None) -> str:
    """A line a run, the errors of those that failed, and how many runs there are of each state.

    Args:
      width: characters a line may have. Names that are too long for it are those overrides that the runs do not share,
        and are cut in the middle if that is too long as well; columns that have no room are left out.
      height: lines there may be. What runs is shown first then, and what is done last.
    """
    names = [row.name for row in rows]
    cells = [_cells(row) for row in rows]
    columns = list(COLUMNS)
    room = None
    if width is not None:
        for dropped in (*DROPPED, None):
            room = width - _taken(cells, columns)
            if room >= NARROWEST or dropped is None:
                break
            columns.remove(dropped)
        room = max(room, 1)
        if any(len(name) > room for name in names):
            names = labels(rows)
    names = [_cut(name, room) for name in names]

    notes = [f"{name}: {row.note}" for name, row in zip(names, rows, strict=True) if row.note]
    notes = notes[:NOTES] + [f"and {len(notes) - NOTES} more errors"] * (len(notes) > NOTES)
    shown = list(range(len(rows)))
    if height is not None and 2 + len(rows) + len(notes) > height:
        notes = notes[: max(height // 4, 0)]
        most = max(height - 3 - len(notes), 1)
        first = sorted(shown, key=lambda index: STATES.index(rows[index].state))  # stable: in the sweep's order
        shown = sorted(first[:most])

    lines = [dict(zip(COLUMNS, COLUMNS, strict=True))]
    lines += [{"run": names[index], **cells[index]} for index in shown]
    widths = {column: max(len(line[column]) for line in lines) for column in columns}
    left = ("run", "state")
    text = [
        "  ".join(line[c].ljust(widths[c]) if c in left else line[c].rjust(widths[c]) for c in columns).rstrip()
        for line in lines
    ]
    if len(shown) < len(rows):
        text.append(f"and {len(rows) - len(shown)} more")
    return "\n".join(_cut(line, width, middle=False) for line in [*text, *notes, counts(rows)])


class Generator:
    """Draws a table again and again in one place of a terminal."""

    def __init__(self, stream: TextIO):
        self.stream, self._lines = stream, 0

    def draw(self, rows: Sequence[Row]) -> None:
        size = shutil.get_terminal_size()
        # One character less: a terminal may wipe the last one of a full line with what is to the right of it.
        lines = table(rows, size.columns - 1, size.lines - 1).splitlines()
        up = f"\x1b[{self._lines}F" if self._lines else ""
        self.stream.write(up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self.stream.flush()
        self._lines = len(lines)


def watch(workdir: str, every: float, stream: TextIO) -> None:
    """Draws the table again and again until all runs have ended, or somebody interrupts it."""
    drawer = Generator(stream)
    while True:
        rows = read(workdir)
        drawer.draw(rows)
        if all(row.state in ENDED for row in rows):
            return
        try:
            time.sleep(every)
        except KeyboardInterrupt:
            return


def _cells(row: Row) -> dict[str, str]:
    step = "-" if row.step is None else f"{row.step:,}"
    loss, speed = row.metrics.get("loss"), row.metrics.get("images_per_second")
    return {
        "state": row.state,
        "step": step if row.steps is None else f"{step}/{row.steps:,}",
        "loss": "-" if loss is None else f"{loss:.4f}" if abs(loss) < 1e6 else f"{loss:.3g}",
        "images/s": "-" if speed is None else f"{speed:,.0f}" if abs(speed) < 1e9 else f"{speed:.3g}",
        "left": "-" if row.left is None else _clock(row.left),
    }


def _taken(cells: Sequence[dict[str, str]], columns: Sequence[str]) -> int:
    """Characters that all columns but the name take."""
    return sum(2 + max(len(column), *(len(line[column]) for line in cells), 0) for column in columns[1:])


def _cut(text: str, room: int | None, *, middle: bool = True) -> str:
    """Text that changes nothing but its own line, with what does not fit left out."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if room is None or len(text) <= room:
        return text
    end = (room - 1) // 2 if middle else 0
    return f"{text[: room - 1 - end]}…{text[len(text) - end :]}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def main() -> None:
    if not 0 < EVERY.value < 1e6:
        raise InputError("every", f"must be seconds above 0, got {EVERY.value}")
    sys.stdout.reconfigure(errors="replace")  # a run may have a name that the terminal cannot show
    if sys.stdout.isatty():
        watch(WORKDIR.value, EVERY.value, sys.stdout)
    else:
        print(table(read(WORKDIR.value)))


if __name__ == "__main__":  # who imports the table has flags of the same names
    WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
    EVERY = flags.DEFINE_float("every", 2.0, "Seconds between two looks, on a terminal.")
    flags.mark_flags_as_required(["workdir"])
    cli.run(main, together=False)
