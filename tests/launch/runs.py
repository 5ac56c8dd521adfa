"""Creates folders like those of a sweep and its runs."""

import contextlib
import io
import json
import pathlib

from PIL import Image

HOSTILE = "<script>alert(1)</script>"


def write_sweep(root, points, *, launcher="local", **more):
    """Writes `sweep.json`. `points` maps names to overrides."""
    root = pathlib.Path(root)
    root.mkdir(parents=True, exist_ok=True)
    listed = [{"name": name, "overrides": overrides, "steps": 200} for name, overrides in points.items()]
    (root / "sweep.json").write_text(json.dumps({"launcher": launcher, "points": listed, **more}))
    return root


def write_run(folder, *, metrics=(), events=(), evaluation=None, goodput=(), previews=()):
    """Writes the given files of a run.

    The events, which are an exit code, "started" or "submitted", are ten seconds apart, starting at second 1000.
    """
    folder = pathlib.Path(folder)
    (folder / "previews").mkdir(parents=True, exist_ok=True)
    for step in previews:
        (folder / f"previews/step_{step:07d}.png").write_bytes(png())
    listed = [
        {"time": 1000.0 + 10 * number, "event": event} if isinstance(event, str)
        else {"time": 1000.0 + 10 * number, "event": "ended", "code": event, "message": f"error: {event}"}
        for number, event in enumerate(events)
    ]  # fmt: skip
    for name, lines in (("metrics", metrics), ("events", listed), ("goodput", goodput)):
        if lines:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if evaluation is not None:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def logged(steps, loss=lambda step: 1 / step):
    """Returns lines of metrics."""
    return [{"step": step, "loss": loss(step), "images_per_second": 100.0} for step in steps]


def png(color=(200, 40, 90)):
    file = io.BytesIO()
    Image.new("RGB", (24, 24), color).save(file, "png")
    return file.getvalue()


def start_steps(folder):
    """Returns the step at which each start of a training began, in order, from its `goodput.jsonl`."""
    first = {}
    for text in (pathlib.Path(folder) / "goodput.jsonl").read_text().splitlines():
        with contextlib.suppress(ValueError):  # a killed training may leave a half-written line
            line = json.loads(text)
            first.setdefault(line["attempt"], line["step"])
    return list(first.values())
