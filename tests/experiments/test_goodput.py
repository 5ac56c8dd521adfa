"""The job that reports where a run's time went."""

import concurrent.futures
import json
import re

from tests.jobs import job
from tests.refusals import refused_field

LINES = [
    ("a", 0, {"start": 10.0}, 1000),
    ("a", 100, {"compile": 30.0, "step": 3000.0, "data": 60.0}, 4090),
    ("b", 50, {"start": 10.0}, 4200),
    ("b", 100, {"step": 1500.0, "other": 390.0}, 6090),
]
ROWS = {
    "start": (20.0, 0.4),
    "compile": (30.0, 0.6),
    "step": (4500.0, 90.0),
    "data": (60.0, 1.2),
    "checkpoint": (0.0, 0.0),
    "preview": (0.0, 0.0),
    "other": (390.0, 7.8),
    "total": (5000.0, 100.0),
    "lost": (1500.0, 30.0),
}


def test_the_table_and_its_errors(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "empty").mkdir()
    with open(tmp_path / "run/goodput.jsonl", "w", encoding="utf-8") as file:
        for line in LINES:
            file.write(json.dumps(dict(zip(("attempt", "step", "seconds", "time"), line, strict=True))) + "\n")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        flags = [f"--workdir={tmp_path / name}" for name in ("run", "empty", "absent")]
        done, empty, absent = pool.map(lambda flag: job("goodput_report", flag), flags)
    assert done.returncode == 0, done.stderr
    *table, starts, goodput = done.stdout.splitlines()
    rows = [re.match(r"(\w+) +([\d,.]+) s +([\d.]+) %", line).groups() for line in table]
    assert {name: (float(seconds.replace(",", "")), float(share)) for name, seconds, share in rows} == ROWS
    assert re.findall(r"[\d.]+", starts) == ["2", "100", "100.0"]  # starts, last step, seconds between the starts
    assert goodput.startswith("goodput 0.6000")
    assert refused_field(empty) == refused_field(absent) == "workdir"
