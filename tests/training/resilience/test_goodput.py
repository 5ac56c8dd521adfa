"""The accounting of time, measured with a fake clock."""

import itertools
import json

import pytest

from diffusion.training.resilience import goodput
from diffusion.training.resilience.goodput import Goodput, summary
from tests.refusals import refused


class Clock:
    """Replaces the module `time`: two clocks that advance on request."""

    def __init__(self):
        self.elapsed, self.wall = 1000.0, 1e9

    def monotonic(self):
        return self.elapsed

    def time(self):
        return self.wall

    def __call__(self, seconds):
        self.elapsed += seconds
        self.wall += seconds


@pytest.fixture
def work(monkeypatch):
    """`work(seconds)` advances both clocks."""
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def attempt(workdir, work, *steps, seconds=10.0):
    """Starts at the first of `steps`, and writes a line at each of the others, with `seconds` per step."""
    meter = Goodput(workdir, steps[0])
    for before, step in itertools.pairwise(steps):
        with meter.spent("step"):
            work(seconds * (step - before))
        meter.write(step)
    return meter


def test_every_second_has_one_kind(tmp_path, work):
    since = work.monotonic()
    work(1)
    meter = Goodput(tmp_path, 0, since=since)
    work(2)
    with meter.spent("compile"):
        work(4)
    work(8)
    with meter.spent("step"):
        work(16)
        with meter.spent("data"):
            work(32)
            with pytest.raises(KeyError), meter.spent("preview"):
                work(64)
                raise KeyError
            work(128)
        work(256)
        meter.write(1)
        work(512)
    work(1024)
    meter.write(2)
    lines = [json.loads(line) for line in (tmp_path / "goodput.jsonl").read_text().splitlines()]
    assert [(line["attempt"], line["step"]) for line in lines] == [(meter.attempt, step) for step in (0, 1, 2)]
    before = {"start": 10, "compile": 4, "step": 272, "data": 160, "preview": 64}
    assert [line["seconds"] for line in lines] == [{"start": 1}, before, {"step": 512, "other": 1024}]
    found = summary(tmp_path)
    kinds = {**before, "start": 11, "step": 784, "other": 1024, "checkpoint": 0}
    assert found["seconds"] == kinds and found["total"] == 2047
    assert found["goodput"] == 784 / 2047 and found["lost"] == 0 and found["starts"] == 1 and found["step"] == 2


def test_the_kind_of_an_open_span_can_change(tmp_path, work):
    meter = Goodput(tmp_path, 0)
    with meter.spent("data"):
        work(3)
        meter.count_as("step")
    with meter.spent("data"):
        work(5)
    meter.write(1)
    assert summary(tmp_path)["seconds"]["step"] == 3 and summary(tmp_path)["seconds"]["data"] == 5


def test_unknown_kind(tmp_path):
    with pytest.raises(ValueError, match="'stepp'"), Goodput(tmp_path, 0).spent("stepp"):
        pass


def test_repeated_steps_are_lost(tmp_path, work):
    attempt(tmp_path, work, 0, 50, 100)
    assert summary(tmp_path)["lost"] == 0
    attempt(tmp_path, work, 80, 120)
    found = summary(tmp_path)
    assert found["lost"] == pytest.approx(200) and found["goodput"] == pytest.approx(1200 / 1400)
    # This attempt starts before the step of the previous one, because newer checkpoints were corrupt.
    attempt(tmp_path, work, 40, 40, 60, seconds=1.0)
    found = summary(tmp_path)
    assert found["lost"] == pytest.approx(600 + 400) and found["starts"] == 3 and found["step"] == 60
    assert found["total"] == pytest.approx(1000 + 400 + 20)


def test_a_run_that_is_extended_loses_nothing(tmp_path, work):
    meter = attempt(tmp_path, work, 0, 100)
    with meter.spent("step"):
        work(1)
    meter.write(100)
    attempt(tmp_path, work, 100, 200)
    assert summary(tmp_path)["lost"] == 0


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_a_truncated_line(tmp_path, work, cut):
    attempt(tmp_path, work, 0, 10, 20)
    path = tmp_path / "goodput.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    whole = 20 if cut == 1 else 10  # without the newline alone, the line is complete
    assert summary(tmp_path)["step"] == whole and summary(tmp_path)["total"] == 10 * whole
    attempt(tmp_path, work, 10, 30)
    found = summary(tmp_path)
    assert found["starts"] == 2 and found["step"] == 30
    assert found["total"] == 100 + 200 and found["lost"] == 0  # the truncated line is removed


def test_the_time_between_attempts(tmp_path, work):
    attempt(tmp_path, work, 0, 10)
    work(70)
    since = work.monotonic()
    work(5)
    Goodput(tmp_path, 10, since=since).write(10)
    assert summary(tmp_path)["down"] == 70 and summary(tmp_path)["total"] == 105
    work.wall -= 1e6
    attempt(tmp_path, work, 10, 20)
    work.wall -= 1e6
    attempt(tmp_path, work, 20, 30)
    found = summary(tmp_path)
    assert found["down"] == 70 and found["total"] == 305 and found["seconds"]["step"] == 300


def test_refuses_a_folder_without_lines(tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        with refused("workdir"):
            summary(folder)
    (tmp_path / "goodput.jsonl").write_bytes(b'{"attempt"\n\xff\n')
    with refused("workdir"):
        summary(tmp_path)
