"""The state and results of a sweep's runs, read from their folders."""

import json
import os
import time

import pytest

from diffusion.core import locks
from launch import results
from tests.launch.runs import HOSTILE, logged, write_run, write_sweep
from tests.refusals import refused

STATES = {
    "waiting": ((), ()),
    "done": (("started", 0), (100, 200)),
    "preempted": (("started", 75), (100,)),
    "refused": (("started", 2), ()),
    "diverged": (("started", 3), (100,)),
    "failed": (("started", 1), (100,)),
    "interrupted": (("started", 75, "started"), (100,)),
}


def only_row(root):
    (row,) = results.read(root)
    return row


@pytest.mark.parametrize("state", STATES)
def test_state_of_a_run_without_a_process(tmp_path, state):
    events, steps = STATES[state]
    write_run(write_sweep(tmp_path, {"a": {}}) / "a", events=events, metrics=logged(steps))
    row = only_row(tmp_path)
    assert row.state == state and row.state in results.STATES
    assert (row.state in results.FINAL_STATES) == (state != "waiting")
    assert row.note == (f"error: {events[-1]}" if state in ("failed", "diverged", "refused") else "")


@pytest.mark.parametrize("events", [("started",), ("started", 75), ()])
def test_run_whose_lock_is_held_is_running(tmp_path, events):
    folder = write_run(write_sweep(tmp_path, {"a": {}}) / "a", events=events)
    with locks.hold(str(folder), "workdir"):
        assert only_row(tmp_path).state == "running"
    assert only_row(tmp_path).state != "running"


@pytest.mark.parametrize(
    ("steps", "age", "events", "state"),
    [
        ((), 0, (), "waiting"),
        ((), 0, ("submitted",), "submitted"),
        ((100,), 60, ("submitted",), "running"),
        ((100,), 1200, ("submitted",), "quiet"),
        ((100, 200), 1200, ("submitted",), "done"),
        ((100,), 10**12, ("submitted",), "submitted"),  # the metrics are those of an earlier start
        ((100,), 60, ("submitted", 3), "diverged"),
    ],
)
def test_state_on_a_cluster_follows_from_the_files(tmp_path, steps, age, events, state):
    folder = write_run(write_sweep(tmp_path, {"a": {}}, launcher="slurm") / "a", events=events, metrics=logged(steps))
    if steps:
        changed = max(time.time() - age, 500)
        os.utime(folder / "metrics.jsonl", (changed, changed))
    assert only_row(tmp_path).state == state


def test_events_of_a_cluster_are_sorted_by_time(tmp_path):
    folder = write_run(write_sweep(tmp_path, {"a": {}}, launcher="slurm") / "a", events=("submitted", "submitted", 2))
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    (folder / "events.jsonl").write_text("".join(lines[1:] + lines[:1]))
    assert only_row(tmp_path).state == "refused"


@pytest.mark.parametrize(("code", "message", "note"), [(-9, "", "SIGKILL"), (7, "", "7"), (1, "a\n b", "a b")])
def test_note_says_why_a_run_failed(tmp_path, code, message, note):
    folder = write_run(write_sweep(tmp_path, {"a": {}}) / "a")
    (folder / "events.jsonl").write_text(json.dumps({"time": 1, "event": "ended", "code": code, "message": message}))
    row = only_row(tmp_path)
    assert row.state == "failed" and note in row.note


def test_exit_on_slurm_has_no_message(tmp_path):
    folder = write_run(write_sweep(tmp_path, {"a": {}}, launcher="slurm") / "a")
    (folder / "events.jsonl").write_text('{"time": 1.0, "event": "ended", "code": 3}\n')
    row = only_row(tmp_path)
    assert row.state == "diverged" and "3" in row.note


def test_metrics_are_the_last_logged_and_those_of_the_evaluation(tmp_path):
    folder = write_run(
        write_sweep(tmp_path, {"a": {"x": 1}}) / "a",
        metrics=[*logged((10, 20)), {"step": 30, "loss": 0.5, "name": "text", "flag": True, "off": float("nan")}],
        evaluation={"loss": 9.0, "distance": 2.0, "of": {"class": {"a": 3}}, "settings": {"seed": 1}},
        previews=(999_999, 9_999_990, 10_000_000),
    )
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "loss": 0.')  # half-written
    (folder / "previews/step_latest.png").touch()
    row = only_row(tmp_path)
    assert (row.step, row.steps, len(row.curve)) == (30, 200, 3)
    assert row.metrics == {"loss": 0.5, "evaluation.loss": 9.0, "distance": 2.0, "of.class.a": 3}
    assert row.curve[0] == {"step": 10, "loss": 0.1, "images_per_second": 100.0}
    assert row.preview == str(folder / "previews/step_10000000.png")


def test_grown_file_is_read_again(tmp_path):
    folder = write_run(write_sweep(tmp_path, {"a": {}}) / "a", metrics=logged((10,)))
    assert only_row(tmp_path).step == 10
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 20}) + "\n")
    assert only_row(tmp_path).step == 20


def test_seconds_of_all_starts_and_seconds_left(tmp_path):
    ticks = [
        ("a", 0, 5.0),
        ("a", 100, 9.0),
        ("b", 50, 1000.0),
        ("b", 60, 1001.0),
        ("b", 80, 1003.0),
        ("b", 100, 1005.0),
    ]
    goodput = [{"attempt": a, "step": step, "time": at, "seconds": {"step": 2.0}} for a, step, at in ticks]
    folder = write_run(
        write_sweep(tmp_path, {"a": {}}) / "a",
        events=("started", 75, "started", 75), metrics=logged((100,)), goodput=goodput,
    )  # fmt: skip
    row = only_row(tmp_path)
    assert (row.seconds, row.starts, row.seconds_left) == (20.0, 2, None)
    with locks.hold(str(folder), "workdir"):
        assert only_row(tmp_path).seconds_left == pytest.approx(10.0)  # 100 steps at 0.1 s
    os.remove(folder / "events.jsonl")  # as on a cluster
    row = only_row(tmp_path)
    assert (row.seconds, row.starts) == (12.0, 2)


@pytest.mark.parametrize("content", ["", '{"event": "ended", "co'])
def test_half_written_files_count_as_missing(tmp_path, content):
    folder = write_run(write_sweep(tmp_path, {"a": {}}) / "a")
    os.rmdir(folder / "previews")
    for name in ("metrics.jsonl", "events.jsonl", "evaluation.json", "goodput.jsonl", "lock"):
        (folder / name).write_text(content)
    row = only_row(tmp_path)
    assert (row.state, row.metrics, row.preview) == ("waiting", {}, None)


@pytest.mark.parametrize("text", ["", "[", "[]", "{}", '{"points": 3}', '{"points": [{"overrides": {}}]}'])
def test_corrupt_sweep_is_refused(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with refused("workdir"):
        results.read(tmp_path)


def test_folder_without_a_sweep_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with refused("workdir"):
            results.read(str(folder))


def test_csv_has_overrides_and_metrics_in_order_of_appearance(tmp_path):
    points = {"a,b": {"lr": 0.001, "name": HOSTILE}, "c": {"lr": 1e-4, "sizes": [1, 2]}, "d": {"on": None}}
    write_sweep(tmp_path, points)
    write_run(tmp_path / "a,b", events=("started", 0), metrics=logged((200,)), evaluation={"fid": 3.5})
    write_run(tmp_path / "c", metrics=[{"step": 5, "grad_norm": 2.0, "loss": 0.25}])
    with open(results.write_csv(tmp_path, results.read(tmp_path)), encoding="utf-8") as file:
        assert file.read() == (
            "name,state,lr,name,sizes,on,step,loss,images_per_second,fid,grad_norm\n"
            f'"a,b",done,0.001,{HOSTILE},,,200,0.005,100.0,3.5,\n'
            'c,interrupted,0.0001,,"[1, 2]",,5,0.25,,,2.0\n'
            "d,waiting,,,,null,,,,,\n"
        )


def test_csv_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "results.csv").mkdir()
    with refused("workdir"):
        results.write_csv(str(tmp_path), [])


def test_labels_show_what_differs():
    def rows(*overrides):
        return [results.ResultRow(f"run{number}", given, "done") for number, given in enumerate(overrides)]

    a, b = {"optimizer.lr": 1, "train.steps": 9, "net.width": 2}, {"optimizer.lr": 1, "train.steps": 9, "data.width": 3}
    assert results.labels(rows(a, b)) == ["net.width=2", "data.width=3"]
    assert results.labels(rows({"a.b": "x"}, {"a.b": True})) == ["b=x", "b=true"]
    assert results.labels(rows(a, a)) == results.labels(rows({}, {})) == ["run0", "run1"]
    assert results.labels(rows({"a": 1}, {})) == ["run0", "run1"]  # the second row has no override to show
