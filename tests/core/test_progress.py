"""The line that reports the progress of long work."""

import io

from diffusion.core import progress


def test_the_first_update_is_not_timed(monkeypatch):
    """Before it, everything is compiled."""
    now = iter([0.0, 100.0, 140.0, 180.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    stream = io.StringIO()
    line = progress.Progress("train", 1000, weight=4, stream=stream)
    for step in (10, 20, 30):
        line.update(step, loss=0.5)
    assert stream.getvalue().splitlines() == [
        "train 10/1,000 (1 %)  loss 0.5000",
        "train 20/1,000 (2 %)  loss 0.5000  1 images/s  1:05:20 left",
        "train 30/1,000 (3 %)  loss 0.5000  1 images/s  1:04:40 left",
    ]
