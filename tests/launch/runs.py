"""Folders as a sweep and its runs leave them."""

import io
import json
import pathlib

from PIL import Image

HOSTILE = "<script>alert(1)</script>"


def sweep(root, points, *, launcher="local", **more):
    """Writes `sweep.json`; `points` is name -> overrides."""
    root = pathlib.Path(root)
    root.mkdir(parents=True, exist_ok=True)
    listed = [{"name": name, "overrides": overrides, "steps": 200} for name, overrides in points.items()]
    (root / "sweep.json").write_text(json.dumps({"launcher": launcher, "points": listed, **more}))
    return root


def run(folder, *, metrics=(), events=(), evaluation=None, goodput=(), previews=()):
    """Writes what is given of a run; events are code, "started" or "submitted", ten seconds apart from second 1000."""
    folder = pathlib.Path(folder)
    (folder / "previews").mkdir(parents=True, exist_ok=True)
    for step in previews:
        (folder / f"previews/step_{step:07d}.png").write_bytes(png())
    listed = [
        {"time": 1000.0 + 10 * number, "event": event} if isinstance(event, str)
        else {"time": 1000.0 + 10 * number, "event": "ended", "code": event, "told": f"error: {event}"}
        for number, event in enumerate(events)
    ]  # fmt: skip
    for name, lines in (("metrics", metrics), ("events", listed), ("goodput", goodput)):
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def logged(steps, loss=lambda step: 1 / step):
    """Lines of metrics."""
    return [{"step": step, "loss": loss(step), "images_per_second": 100.0} for step in steps]


def png(color=(200, 40, 90)):
    file = io.BytesIO()
    Image.new("RGB", (24, 24), color).save(file, "png")
    return file.getvalue()
