"""Puts the results of a sweep into one page that needs no other file and no network, `results.html`, and into
`results.csv`.

python -m launch.report --workdir=runs/lr
"""

import base64
import html
import json
import os
import pathlib
import re
import time
import urllib.parse
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath

from diffusion.core import files
from diffusion.core.types import InputError
from experiments import cli
from launch import results
from launch.results import Row

HERE = pathlib.Path(__file__).parent
POINTS = 200  # of a curve
ALL_POINTS = 40_000  # of one metric's curves together, as long as each has 50
PICTURE = 2 * 2**20  # bytes of one picture
PICTURES = 48 * 2**20  # bytes of all
LOWER = {"loss", "distance", "curvature", "bits", "nll", "error", "fid", "kid", "mmd", "off", "perplexity"}
HIGHER = {"accuracy", "precision", "recall", "coverage", "psnr", "ssim", "readable", "images_per_second"}


def write_html(workdir: str, rows: Sequence[Row], title: str | None = None) -> str:
    """Writes `results.html`, and returns its path: a table to sort, the curves, and the newest samples of each run.

    Args:
      title: of the page; by default the folder's name.

    Raises:
      InputError: the folder is no sweep's, or cannot be written.
    """
    sweep = results.read_sweep(workdir)
    name = os.path.basename(os.path.abspath(workdir) if not files.is_remote(workdir) else workdir.rstrip("/"))
    page = {kind: (HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")}
    filled = {
        "title": html.escape(title or name),
        "data": _embedded(_page(sweep, rows, title or name)),
        "style": page["css"],
        "script": page["js"],
    }
    # In one pass: what is filled in may look like a place to fill.
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], page["html"])
    path = os.path.join(workdir, "results.html")
    try:
        with files.replace(path) as file:
            file.write(text.encode(errors="replace").decode())
    except OSError as error:
        raise InputError("workdir", f"{path} cannot be written: {error.strerror or error}") from error
    return path


def direction(metric: str) -> str | None:
    """Whether `lower` or `higher` values of a metric are the better ones; None if its name does not say."""
    words = {metric, *re.split(r"[^a-z]+", metric.lower())}
    lower, higher = bool(words & LOWER), bool(words & HIGHER)
    return None if lower == higher else "lower" if lower else "higher"


def thinned(curve: Sequence[Any], most: int) -> list[Any]:
    """At most so many entries (two or more), evenly spread, the first and the last among them."""
    if len(curve) <= most:
        return list(curve)
    return [curve[round(index * (len(curve) - 1) / (most - 1))] for index in range(most)]


def _page(sweep: dict[str, Any], rows: Sequence[Row], title: str) -> dict[str, Any]:
    """All that the page shows, as JSON."""
    varied = results.differing(rows)
    shared = [key for key in results.keys(row.overrides for row in rows) if key not in varied]
    logged = set(_logged([point for row in rows for point in row.curve[-1:]]))
    metrics = results.keys(row.metrics for row in rows)
    metrics.sort(key=lambda metric: (metric != "loss", metric in logged))  # what a run ends with, before the details
    most = min(POINTS, max(ALL_POINTS // max(len(rows), 1), 50))
    runs, room = [], PICTURES
    for row, label in zip(rows, results.labels(rows), strict=True):
        picture, lacking = _picture(row.picture, room)
        room -= len(picture)
        curve = thinned(row.curve, most)
        runs.append({
            "name": row.name,
            "label": label,
            "folder": "./" + urllib.parse.quote(row.name, errors="replace") + "/",
            "state": row.state,
            "step": row.step,
            "steps": row.steps,
            "seconds": round(row.seconds),
            "starts": row.starts,
            "note": row.note,
            "overrides": [_cell(row.overrides[key]) if key in row.overrides else None for key in varied],
            "metrics": [row.metrics.get(key) for key in metrics],
            "curve": {key: [_short(point.get(key)) for point in curve] for key in ["step", *_logged(curve)]},
            "picture": base64.b64encode(picture).decode(),
            "lacking": lacking,
        })  # fmt: skip
    short = results.shortened(varied)
    return {
        "title": title,
        "counts": results.counts(rows),
        "config": sweep.get("config"),
        "sweep": sweep.get("sweep"),
        "commit": sweep.get("commit"),
        "clean": sweep.get("clean"),
        "written": time.strftime("%Y-%m-%d %H:%M %Z"),
        "states": results.STATES,
        "varied": [{"name": key, "short": short[key]} for key in varied],
        "shared": {key: results.spell(rows[0].overrides[key]) for key in shared},
        "metrics": [{"name": key, "better": direction(key)} for key in metrics],
        "runs": runs,
    }


def _embedded(value: Any) -> str:
    """JSON that stays within the script element that it is put into, whatever it says."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _cell(value: Any) -> float | str:
    """A number that a browser holds too, or text."""
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**53
    return value if whole or (isinstance(value, float) and abs(value) < float("inf")) else results.spell(value)


def _logged(curve: Sequence[Any]) -> list[str]:
    return [key for key in results.keys(curve) if key != "step"]


def _short(value: float | None) -> float | None:
    return None if value is None else value if isinstance(value, int) else float(f"{value:.5g}")


def _picture(path: str | None, room: int) -> tuple[bytes, str]:
    """A whole PNG, or why there is none."""
    if path is None:
        return b"", ""
    name = os.path.basename(path)
    try:
        size = epath.Path(path).stat().length
        if size > PICTURE:
            return b"", f"{name} is too large for this page ({size / 2**20:.1f} MB)"
        if size > room:
            return b"", f"{name} has no room in this page any more"
        found = epath.Path(path).read_bytes()
    except Exception:  # each kind of storage raises its own
        return b"", f"{name} cannot be read"
    whole = found.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in found[-12:]
    return (found, "") if whole else (b"", f"{name} is damaged")


def main() -> None:
    rows = results.read(WORKDIR.value)
    print(results.write_csv(WORKDIR.value, rows))
    print(write_html(WORKDIR.value, rows))


if __name__ == "__main__":  # who imports the functions has a flag of the same name
    WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the sweep.")
    flags.mark_flags_as_required(["workdir"])
    cli.run(main, together=False)
