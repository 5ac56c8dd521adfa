"""Summarizes the results of a sweep in `results.csv` and in the self-contained page `results.html`.

python -m launch.report --workdir=runs/lr
"""

import base64
import html
import json
import math
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
from experiments import cli
from launch import results
from launch.results import ResultRow

HERE = pathlib.Path(__file__).parent
MAX_POINTS = 200  # points per curve
MAX_TOTAL_POINTS = 40_000  # points of all curves of a metric together, unless that leaves fewer than 50 per curve
MAX_IMAGE_BYTES = 2 * 2**20  # bytes of one preview image
MAX_TOTAL_BYTES = 48 * 2**20  # bytes of all preview images
LOWER_IS_BETTER = {"loss", "distance", "curvature", "bits", "nll", "error", "fid", "kid", "mmd", "off", "perplexity"}
HIGHER_IS_BETTER = {"accuracy", "precision", "recall", "coverage", "psnr", "ssim", "readable", "images_per_second"}


def write_html(workdir: str, rows: Sequence[ResultRow], title: str | None = None) -> str:
    """Writes `results.html` and returns its path.

    The page contains a sortable table, the curves, and the newest preview of each run.

    Args:
      workdir: Folder of the sweep.
      rows: The runs.
      title: Title of the page; by default the name of the folder.

    Raises:
      InputError: The folder does not contain a sweep or cannot be written.
    """
    sweep = results.read_sweep(workdir)
    name = os.path.basename(os.path.abspath(workdir) if not files.is_remote(workdir) else workdir.rstrip("/"))
    page = {kind: (HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")}
    filled = {
        "title": html.escape(title or name),
        "data": _json_for_script(_page(sweep, rows, title or name)),
        "style": page["css"],
        "script": page["js"],
    }
    # One pass, because inserted text may look like a placeholder.
    text = re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], page["html"])
    path = os.path.join(workdir, "results.html")
    with files.writing(path, "workdir"), files.replace(path) as file:
        file.write(text)
    return path


def direction(metric: str) -> str | None:
    """Returns whether `lower` or `higher` values of a metric are better, or None if its name does not say."""
    words = {metric, *re.split(r"[^a-z]+", metric.lower())}
    lower, higher = bool(words & LOWER_IS_BETTER), bool(words & HIGHER_IS_BETTER)
    return None if lower == higher else "lower" if lower else "higher"


def subsample(curve: Sequence[Any], most: int) -> list[Any]:
    """Returns at most `most` (two or more) evenly spaced entries, including the first and the last one."""
    if len(curve) <= most:
        return list(curve)
    return [curve[round(index * (len(curve) - 1) / (most - 1))] for index in range(most)]


def _page(sweep: dict[str, Any], rows: Sequence[ResultRow], title: str) -> dict[str, Any]:
    """Returns the data of the page as a JSON value."""
    varied = results.varied_fields(rows)
    shared = [key for key in results.all_keys(row.overrides for row in rows) if key not in varied]
    logged = set(_logged([point for row in rows for point in row.curve[-1:]]))
    metrics = results.all_keys(row.metrics for row in rows)
    metrics.sort(key=lambda metric: (metric != "loss", metric in logged))  # final metrics come before logged details
    most = min(MAX_POINTS, max(MAX_TOTAL_POINTS // max(len(rows), 1), 50))
    runs, bytes_left = [], MAX_TOTAL_BYTES
    for row, label in zip(rows, results.labels(rows), strict=True):
        image, problem = _read_preview(row.preview, bytes_left)
        bytes_left -= len(image)
        curve = subsample(row.curve, most)
        runs.append({
            "name": row.name,
            "label": label,
            "folder": "./" + urllib.parse.quote(row.name) + "/",
            "state": row.state,
            "step": row.step,
            "steps": row.steps,
            "seconds": round(row.seconds),
            "starts": row.starts,
            "note": row.note,
            "overrides": [_cell(row.overrides[key]) if key in row.overrides else None for key in varied],
            "metrics": [row.metrics.get(key) for key in metrics],
            "curve": {key: [_short(point.get(key)) for point in curve] for key in ["step", *_logged(curve)]},
            "preview": base64.b64encode(image).decode(),
            "problem": problem,
        })  # fmt: skip
    short = results.short_names(varied)
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
        "shared": {key: results.as_text(rows[0].overrides[key]) for key in shared},
        "metrics": [{"name": key, "better": direction(key)} for key in metrics],
        "runs": runs,
    }


def _json_for_script(value: Any) -> str:
    """Returns JSON that cannot close the script element in which it is embedded."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e")


def _cell(value: Any) -> float | str:
    """Returns a finite number unchanged, and any other value as text."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else results.as_text(value)


def _logged(curve: Sequence[Any]) -> list[str]:
    return [key for key in results.all_keys(curve) if key != "step"]


def _short(value: float | None) -> float | None:
    return None if value is None else value if isinstance(value, int) else float(f"{value:.5g}")


def _read_preview(path: str | None, bytes_left: int) -> tuple[bytes, str]:
    """Returns a complete PNG file, or b"" and the reason why there is none."""
    if path is None:
        return b"", ""
    name = os.path.basename(path)
    try:
        size = epath.Path(path).stat().length
        if size > MAX_IMAGE_BYTES:
            return b"", f"{name} is too large for this page ({size / 2**20:.1f} MB)"
        if size > bytes_left:
            return b"", f"{name} exceeds the size limit of this page"
        found = epath.Path(path).read_bytes()
    except Exception:  # the exceptions depend on the storage backend
        return b"", f"{name} cannot be read"
    complete = found.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in found[-12:]
    return (found, "") if complete else (b"", f"{name} is incomplete")


def main() -> None:
    rows = results.read(WORKDIR.value)
    print(results.write_csv(WORKDIR.value, rows))
    print(write_html(WORKDIR.value, rows))


if __name__ == "__main__":  # importing modules define a flag of the same name
    WORKDIR = cli.define_path("workdir", None, "Folder of the sweep.")
    flags.mark_flags_as_required(["workdir"])
    cli.run(main, together=False)
