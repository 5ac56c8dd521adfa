"""A line that reports the progress of long work."""

import collections
import io
import itertools
import statistics
import sys
import time

from diffusion.core import files


class Progress:
    """A progress line such as `train 120/2,000 (6 %)  loss 0.0312  1,234 images/s  1:32 left`.

    On a terminal it is rewritten in place; elsewhere a new line is printed every 30 seconds. The rate is the median
    over the last updates, so that compilation and pauses do not affect it. The line of the first update, before which
    everything is compiled, shows no rate.

    Args:
      title: Name of the work.
      total: Number of units of the whole work.
      done: Number of units done before this start.
      weight: Images per unit.
      stream: Where to write; standard error by default, and nowhere in processes other than the first.
    """

    def __init__(self, title: str, total: int, *, done: int = 0, weight: int = 1, stream=None):
        self.title, self.total, self.weight = title, total, weight
        self.stream = stream or (sys.stderr if files.writes() else io.StringIO())
        self.live = self.stream.isatty()
        self.interval = 0.2 if self.live else 30.0
        self.marks = collections.deque([(time.monotonic(), done)], maxlen=32)
        self.printed_at = self.marks[0][0]

    def update(self, done: int, **values: float) -> None:
        """Records that `done` units are done, and prints the line if it is due; `values` are shown in it."""
        now = time.monotonic()
        self.marks.append((now, done))
        if now - self.printed_at < self.interval and done < self.total:
            return
        self.printed_at = now
        line = self._line(now, done, values)
        self.stream.write(f"\r{line}\x1b[K" if self.live else f"{line}\n")
        self.stream.flush()

    def close(self) -> None:
        """Ends the line."""
        if self.live:
            self.stream.write("\n")
            self.stream.flush()

    def rate(self) -> float:
        """Returns the units per second, the median over the last updates but the first, if there are others."""
        rates = [(n - m) / max(b - a, 1e-9) for (a, m), (b, n) in itertools.pairwise(self.marks)]
        return statistics.median(rates[1:] or rates) if rates else 0.0

    def _line(self, now: float, done: int, values: dict[str, float]) -> str:
        rate = self.rate()
        shown = "".join(f"  {name} {value:.4f}" for name, value in values.items())
        if len(self.marks) > 2 and rate > 0:
            shown += f"  {rate * self.weight:,.0f} images/s  {_clock((self.total - done) / rate)} left"
        return f"{self.title} {done:,}/{self.total:,} ({100 * done // self.total} %){shown}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
