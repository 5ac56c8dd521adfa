"""Shows the progress of a sweep's runs.

On a terminal, a table is redrawn every few seconds until all runs have ended. Elsewhere it is printed once.

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
from launch.results import FINAL_STATES, STATES, ResultRow, counts, labels, read

COLUMNS = ("run", "state", "step", "loss", "images/s", "left")
OPTIONAL = ("images/s", "left", "loss")  # columns dropped on narrow terminals, in this order
MIN_NAME_WIDTH = 16  # a column is dropped if fewer characters would be left for a run's name
MAX_NOTES = 5  # errors shown below the table


def table(rows: Sequence[ResultRow], width: int | None = None, height: int | None = None) -> str:
    """Returns a table with one line per run, the errors of failed runs, and the number of runs per state.

    Args:
      rows: The runs.
      width: Maximum number of characters per line. If the names are too long, they are replaced by the overrides that
        differ between the runs, and shortened in the middle if necessary; columns without space are dropped.
      height: Maximum number of lines. If there are more runs, active ones are shown first and finished ones last.
    """
    names = [row.name for row in rows]
    cells = [_cells(row) for row in rows]
    columns = list(COLUMNS)
    name_width = None
    if width is not None:
        for dropped in (*OPTIONAL, None):
            name_width = width - _other_columns_width(cells, columns)
            if name_width >= MIN_NAME_WIDTH or dropped is None:
                break
            columns.remove(dropped)
        name_width = max(name_width, 1)
        if any(len(name) > name_width for name in names):
            names = labels(rows)
    names = [_shorten(name, name_width) for name in names]

    notes = [f"{name}: {row.note}" for name, row in zip(names, rows, strict=True) if row.note]
    notes = notes[:MAX_NOTES] + [f"and {len(notes) - MAX_NOTES} more errors"] * (len(notes) > MAX_NOTES)
    shown = list(range(len(rows)))
    if height is not None and 2 + len(rows) + len(notes) > height:
        notes = notes[: max(height // 4, 0)]
        most = max(height - 3 - len(notes), 1)
        # A stable sort keeps the order of the sweep among runs with the same state.
        first = sorted(shown, key=lambda index: STATES.index(rows[index].state))
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
    return "\n".join(_shorten(line, width, middle=False) for line in [*text, *notes, counts(rows)])


class LiveTable:
    """A table that is redrawn in place on a terminal."""

    def __init__(self, stream: TextIO):
        self.stream, self._lines = stream, 0

    def draw(self, rows: Sequence[ResultRow]) -> None:
        """Draws the table over the previous one."""
        size = shutil.get_terminal_size()
        # Leaves one column free: clearing to the end of a full line erases its last character on some terminals.
        lines = table(rows, size.columns - 1, size.lines - 1).splitlines()
        up = f"\x1b[{self._lines}F" if self._lines else ""
        self.stream.write(up + "".join(f"{line}\x1b[K\n" for line in lines) + "\x1b[J")
        self.stream.flush()
        self._lines = len(lines)


def watch(workdir: str, every: float, stream: TextIO) -> None:
    """Redraws the table every `every` seconds until all runs have ended, or until it is interrupted."""
    live_table = LiveTable(stream)
    while True:
        rows = read(workdir)
        live_table.draw(rows)
        if all(row.state in FINAL_STATES for row in rows):
            return
        try:
            time.sleep(every)
        except KeyboardInterrupt:
            return


def _cells(row: ResultRow) -> dict[str, str]:
    step = "-" if row.step is None else f"{row.step:,}"
    loss, speed = row.metrics.get("loss"), row.metrics.get("images_per_second")
    return {
        "state": row.state,
        "step": step if row.steps is None else f"{step}/{row.steps:,}",
        "loss": "-" if loss is None else f"{loss:.4f}" if abs(loss) < 1e6 else f"{loss:.3g}",
        "images/s": "-" if speed is None else f"{speed:,.0f}" if abs(speed) < 1e9 else f"{speed:.3g}",
        "left": "-" if row.seconds_left is None else _clock(row.seconds_left),
    }


def _other_columns_width(cells: Sequence[dict[str, str]], columns: Sequence[str]) -> int:
    """Returns the number of characters that all columns except the name take."""
    return sum(2 + max(len(column), *(len(line[column]) for line in cells), 0) for column in columns[1:])


def _shorten(text: str, width: int | None, *, middle: bool = True) -> str:
    """Removes what does not fit, and replaces control characters, which could affect the terminal."""
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    if width is None or len(text) <= width:
        return text
    end = (width - 1) // 2 if middle else 0
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def main() -> None:
    if not 0 < EVERY.value < 1e6:
        raise InputError("every", f"must be a positive number of seconds, got {EVERY.value}")
    sys.stdout.reconfigure(errors="replace")  # the encoding may not support the names of runs
    if sys.stdout.isatty():
        watch(WORKDIR.value, EVERY.value, sys.stdout)
    else:
        print(table(read(WORKDIR.value)))


if __name__ == "__main__":  # importing modules define flags of the same names
    WORKDIR = cli.define_path("workdir", None, "Folder of the sweep.")
    EVERY = flags.DEFINE_float("every", 2.0, "Seconds between two redraws on a terminal.")
    flags.mark_flags_as_required(["workdir"])
    cli.run(main, together=False)
