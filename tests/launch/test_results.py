"""What the folders of a sweep's runs are read as, whole and damaged."""

import json
import os
import time

import pytest

from diffusion.core.types import InputError
from launch import locks, results
from tests.launch.runs import HOSTILE, logged, run, sweep

STATES = {
    "waiting": ((), ()),
    "done": (("started", 0), (100, 200)),
    "preempted": (("started", 75), (100,)),
    "refused": (("started", 2), ()),
    "diverged": (("started", 3), (100,)),
    "failed": (("started", 1), (100,)),
    "interrupted": (("started", 75, "started"), (100,)),
}


def only(root):
    (row,) = results.read(root)
    return row


@pytest.mark.parametrize("state", STATES)
def test_state_of_a_run_that_nobody_works_on(tmp_path, state):
    events, steps = STATES[state]
    run(sweep(tmp_path, {"a": {}}) / "a", events=events, metrics=logged(steps))
    row = only(tmp_path)
    assert row.state == state and row.state in results.STATES
    assert (row.state in results.ENDED) == (state != "waiting")
    assert row.note == (f"error: {events[-1]}" if state in ("failed", "diverged", "refused") else "")


@pytest.mark.parametrize("events", [("started",), ("started", 75), ()])
def test_a_run_whose_lock_is_held_is_running(tmp_path, events):
    folder = run(sweep(tmp_path, {"a": {}}) / "a", events=events)
    with locks.hold(str(folder), "workdir"):
        assert only(tmp_path).state == "running"
    assert only(tmp_path).state != "running"


@pytest.mark.parametrize(
    ("steps", "age", "events", "state"),
    [
        ((), 0, (), "waiting"),
        ((), 0, ("submitted",), "submitted"),
        ((100,), 60, ("submitted",), "running"),
        ((100,), 1200, ("submitted",), "quiet"),
        ((100, 200), 1200, ("submitted",), "done"),
        ((100,), 10**12, ("submitted",), "submitted"),  # the metrics are of an earlier start
        ((100,), 60, ("submitted", 3), "diverged"),
    ],
)
def test_state_on_a_cluster_is_told_by_what_was_written(tmp_path, steps, age, events, state):
    folder = run(sweep(tmp_path, {"a": {}}, launcher="slurm") / "a", events=events, metrics=logged(steps))
    if steps:
        changed = max(time.time() - age, 500)
        os.utime(folder / "metrics.jsonl", (changed, changed))
    assert only(tmp_path).state == state


def test_a_run_on_a_cluster_may_have_ended_before_it_is_said_to_be_submitted(tmp_path):
    folder = run(sweep(tmp_path, {"a": {}}, launcher="slurm") / "a", events=("submitted", "submitted", 2))
    lines = (folder / "events.jsonl").read_text().splitlines(keepends=True)
    (folder / "events.jsonl").write_text("".join(lines[1:] + lines[:1]))
    assert only(tmp_path).state == "refused"


@pytest.mark.parametrize(
    ("code", "told", "note"),
    [(-9, "", "ended by SIGKILL"), (7, None, "exit code 7"), ("?", None, "nobody knows"), (1, "a\n b", "a b")],
)
def test_note_says_how_it_failed(tmp_path, code, told, note):
    folder = run(sweep(tmp_path, {"a": {}}) / "a")
    (folder / "events.jsonl").write_text(json.dumps({"time": 1, "event": "ended", "code": code, "told": told}))
    row = only(tmp_path)
    assert row.state == "failed" and note in row.note


def test_metrics_are_the_last_logged_and_the_evaluations(tmp_path):
    folder = run(
        sweep(tmp_path, {"a": {"x": 1}}) / "a",
        metrics=[*logged((10, 20)), {"step": 30, "loss": 0.5, "name": "text", "flag": True, "off": float("nan")}],
        evaluation={"loss": 9.0, "distance": 2.0, "of": {"class": {"a": 3}}, "settings": {"seed": 1}},
        previews=(999_999, 9_999_990, 10_000_000),
    )
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "loss": 0.')  # a kill
    (folder / "previews/step_latest.png").touch()
    row = only(tmp_path)
    assert (row.step, row.steps, len(row.curve)) == (30, 200, 3)
    assert row.metrics == {"loss": 0.5, "evaluation.loss": 9.0, "distance": 2.0, "of.class.a": 3}
    assert row.curve[0] == {"step": 10, "loss": 0.1, "images_per_second": 100.0}
    assert row.picture == str(folder / "previews/step_10000000.png")


def test_a_file_is_read_again_when_it_has_grown(tmp_path):
    folder = run(sweep(tmp_path, {"a": {}}) / "a", metrics=logged((10,)))
    assert only(tmp_path).step == 10
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 20}) + "\n")
    assert only(tmp_path).step == 20


def test_time_is_of_all_starts_and_what_is_left_of_the_last(tmp_path):
    ticks = [
        ("a", 0, 5.0),
        ("a", 100, 9.0),
        ("b", 50, 1000.0),
        ("b", 60, 1001.0),
        ("b", 80, 1003.0),
        ("b", 100, 1005.0),
    ]
    goodput = [{"attempt": a, "step": step, "time": at, "seconds": {"step": 2.0}} for a, step, at in ticks]
    folder = run(
        sweep(tmp_path, {"a": {}}) / "a",
        events=("started", 75, "started", 75), metrics=logged((100,)), goodput=goodput,
    )  # fmt: skip
    row = only(tmp_path)
    assert (row.seconds, row.starts, row.left) == (20.0, 2, None)
    with locks.hold(str(folder), "workdir"):
        assert only(tmp_path).left == pytest.approx(10.0)  # 100 steps at 0.1 s
    os.remove(folder / "events.jsonl")  # as on a cluster
    row = only(tmp_path)
    assert (row.seconds, row.starts) == (12.0, 2)


GARBAGE = {
    "nothing": b"",
    "bytes": bytes(range(256)) * 40,
    "cut": b'{"event": "ended", "co',
    "list": b"[1, 2]\n[]\n",
    "wrong": b'{"step": "x", "event": 3, "time": [], "attempt": {}, "seconds": 4}\n{"step": -1, "event": "ended"}\n',
    "numbers": b'{"step": 1e999, "loss": NaN}\n{"step": true}\n{"step": 1' + b"0" * 400 + b"}\n",
    "deep": b"[" * 100_000,
    "deeper": b'{"a": ' * 500 + b"1" + b"}" * 500,
    "surrogates": rb'{"\ud800": 1, "step": 3, "event": "ended", "time": 5, "told": "\udfff", "code": 1}',
}


@pytest.mark.parametrize("kind", [*GARBAGE, "folder"])
def test_whatever_is_in_a_runs_folder_can_be_read_and_written_on(tmp_path, kind):
    folder = run(sweep(tmp_path, {"a": {"x": [1, None]}, "whole": {}}) / "a")
    run(tmp_path / "whole", events=("started", 0), metrics=logged((200,)))
    os.rmdir(folder / "previews")
    for name in ("metrics.jsonl", "events.jsonl", "evaluation.json", "goodput.jsonl", "previews", "lock"):
        if kind == "folder":
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(GARBAGE[kind])
    row, whole = results.read(tmp_path)
    assert row.state in results.STATES and row.picture is None
    assert (whole.state, whole.metrics["loss"]) == ("done", 1 / 200)
    with open(results.write_csv(tmp_path, [row, whole]), encoding="utf-8") as file:
        assert len(file.read().splitlines()) == 3


@pytest.mark.parametrize(
    "text",
    [
        "", "[", "[]", "{}", '{"points": 3}', '{"points": [4]}', '{"points": [{"name": 4}]}', "\0",
        '{"points": [{"name": "a"}, {"name": "a"}]}', '{"points": [{"name": "a", "overrides": []}]}',
        *(json.dumps({"points": [{"name": name}]}) for name in ("..", "a/../../b", "/etc", "", ".", "a\0")),
    ],
)  # fmt: skip
def test_a_damaged_sweep_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(InputError, match=r"workdir: .*damaged"):
        results.read(tmp_path)


def test_a_folder_that_is_no_sweeps_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"workdir: .* has no sweep.json; python -m launch.sweep"):
        results.read(str(tmp_path))
    with pytest.raises(InputError, match=r"workdir: .* does not exist"):
        results.read(str(tmp_path / "absent"))


def test_csv_has_every_override_and_metric_in_order_of_appearance(tmp_path):
    sweep(tmp_path, {"a,b": {"lr": 0.001, "name": HOSTILE}, "c": {"lr": 1e-4, "sizes": [1, 2]}, "d": {"on": None}})
    run(tmp_path / "a,b", events=("started", 0), metrics=logged((200,)), evaluation={"fid": 3.5})
    run(tmp_path / "c", metrics=[{"step": 5, "grad_norm": 2.0, "loss": 0.25}])
    with open(results.write_csv(tmp_path, results.read(tmp_path)), encoding="utf-8") as file:
        assert file.read() == (
            "name,state,lr,name,sizes,on,step,loss,images_per_second,fid,grad_norm\n"
            f'"a,b",done,0.001,{HOSTILE},,,200,0.005,100.0,3.5,\n'
            'c,interrupted,0.0001,,"[1, 2]",,5,0.25,,,2.0\n'
            "d,waiting,,,,null,,,,,\n"
        )


def test_csv_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "results.csv").mkdir()
    with pytest.raises(InputError, match=r"workdir: .*results.csv cannot be written"):
        results.write_csv(str(tmp_path), [])


def test_labels_say_what_differs():
    def rows(*overrides):
        return [results.Row(f"run{number}", given, "done") for number, given in enumerate(overrides)]

    a, b = {"optimizer.lr": 1, "train.steps": 9, "net.width": 2}, {"optimizer.lr": 1, "train.steps": 9, "data.width": 3}
    assert results.labels(rows(a, b)) == ["net.width=2", "data.width=3"]
    assert results.labels(rows({"a.b": "x"}, {"a.b": True})) == ["b=x", "b=true"]
    assert results.labels(rows(a, a)) == results.labels(rows({}, {})) == ["run0", "run1"]
    assert results.labels(rows({"a": 1}, {})) == ["run0", "run1"]  # the second has nothing of its own to show
