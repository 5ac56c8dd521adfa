"""The status table of a sweep, on a terminal and elsewhere."""

import fcntl
import json
import os
import pathlib
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time

import pytest

from diffusion.core import locks
from launch.results import ResultRow
from launch.status import table
from tests.jobs import job
from tests.launch.runs import logged, write_run, write_sweep
from tests.refusals import refused_field

ROOT = pathlib.Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "launch.status"]
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("COLUMNS", None)
ENVIRONMENT.pop("LINES", None)


def rows(number=3):
    states = ("done", "running", "failed")
    return [
        ResultRow(
            f"learning_rate=0.00{index},network=unet-{index:08x}",
            {"optimizer.learning_rate": 0.001 * index, "network.name": "unet"},
            states[index % 3], step=1000 * index, steps=2000, metrics={"loss": 0.5, "images_per_second": 1234.5},
            note="error: out of memory" * (index % 3 == 2), seconds_left=3725.0 if index % 3 == 1 else None,
        )
        for index in range(number)
    ]  # fmt: skip


def test_table_has_one_line_per_run():
    assert table(rows()) == (
        "run                                        state           step    loss  images/s     left\n"
        "learning_rate=0.000,network=unet-00000000  done         0/2,000  0.5000     1,234        -\n"
        "learning_rate=0.001,network=unet-00000001  running  1,000/2,000  0.5000     1,234  1:02:05\n"
        "learning_rate=0.002,network=unet-00000002  failed   2,000/2,000  0.5000     1,234        -\n"
        "learning_rate=0.002,network=unet-00000002: error: out of memory\n"
        "1 done, 1 failed, 1 running"
    )
    assert table([]).endswith("no runs") and table([ResultRow("a", {}, "waiting")], 20).endswith("1 waiting")


def test_long_names_are_replaced_by_the_differing_overrides():
    text = table(rows(), 72)
    assert "learning_rate=0.001" in text and "unet" not in text
    assert max(map(len, text.splitlines())) <= 72


@pytest.mark.parametrize("width", [1, 10, 30, 40, 50, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(width):
    lines = table([*rows(), ResultRow("x" * 500, {}, "refused", note="y" * 500)], width).splitlines()
    assert max(map(len, lines)) <= width and len(lines) == 8
    assert ("images/s" in lines[0]) == (width >= 80)
    assert width < 30 or ("…" in lines[4]) == (len(lines[4]) < 500)


def test_active_runs_come_first_if_the_terminal_has_few_lines():
    text = table(rows(99), 100, 20)
    assert len(text.splitlines()) <= 20
    assert text.count("  running  ") > 5 and "  done  " not in text
    assert re.search(r"^and \d+ more$", text, re.M) and text.endswith("33 done, 33 failed, 33 running")


def test_control_characters_do_not_reach_the_terminal():
    text = table([ResultRow("a\x1b[2J\nb", {}, "failed", note="\x07\rerror")])
    assert "\x1b" not in text and "\x07" not in text and "\r" not in text and len(text.splitlines()) == 4


def test_job_prints_one_table_without_a_terminal(tmp_path):
    write_run(write_sweep(tmp_path, {"a": {}, "b\u00e9": {}}) / "a", events=("started", 0), metrics=logged((200,)))
    done = subprocess.run(
        [*COMMAND, f"--workdir={tmp_path}"], capture_output=True, cwd=ROOT,
        env={**ENVIRONMENT, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == b"1 done, 1 waiting" and b"\x1b" not in done.stdout


@pytest.mark.parametrize(("flag", "field"), [("--every=2", "workdir"), ("--every=0", "every")])
def test_job_refuses_in_one_line(tmp_path, flag, field):
    done = job("launch.status", f"--workdir={tmp_path}", flag)  # the folder has no sweep
    assert refused_field(done) == field and not done.stdout


def test_job_redraws_on_a_terminal_until_all_runs_have_ended(tmp_path):
    folder = write_run(write_sweep(tmp_path, {"a": {}}) / "a", events=("started",), metrics=logged((100,)))
    lock = locks.hold(str(folder), "workdir")
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, f"--workdir={tmp_path}", "--every=0.1"], stdout=theirs, cwd=ROOT, env=ENVIRONMENT
    )
    os.close(theirs)
    seen = read_until(ours, b"1 running")
    with open(folder / "events.jsonl", "a") as file:
        file.write(json.dumps({"time": 2000.0, "event": "ended", "code": 0}) + "\n")
    lock.close()
    seen += read_until(ours, b"1 done")
    assert process.wait(30) == 0
    assert b"\x1b[3F" in seen, "each redraw must start at the first of the three lines"
    os.close(ours)


def read_until(terminal, wanted):
    seen, deadline = b"", time.monotonic() + 60
    while wanted not in seen and time.monotonic() < deadline:
        if select.select([terminal], [], [], 1)[0]:
            try:
                seen += os.read(terminal, 4096)
            except OSError:  # the job has ended
                break
    assert wanted in seen, seen
    return seen
