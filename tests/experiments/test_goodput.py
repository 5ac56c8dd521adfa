"""The job that tells where a run's time went."""

import concurrent.futures
import json

from tests.jobs import job, one_line

LINES = [
    ("a", 0, {"start": 10.0}, 1000),
    ("a", 100, {"compile": 30.0, "step": 3000.0, "data": 60.0}, 4090),
    ("b", 50, {"start": 10.0}, 4200),
    ("b", 100, {"step": 1500.0, "other": 390.0}, 6090),
]
TABLE = """\
start                20.0 s    0.4 %
compile              30.0 s    0.6 %
step              4,500.0 s   90.0 %
data                 60.0 s    1.2 %
checkpoint            0.0 s    0.0 %
preview               0.0 s    0.0 %
other               390.0 s    7.8 %
total             5,000.0 s  100.0 %
lost              1,500.0 s   30.0 %  of step: work done again after a restart
2 starts to step 100, 100.0 s between them by the wall clock
goodput 0.6000: steps that were not lost, of the total
"""


def test_prints_the_table_or_one_line(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "empty").mkdir()
    with open(tmp_path / "run/goodput.jsonl", "w", encoding="utf-8") as file:
        for line in LINES:
            file.write(json.dumps(dict(zip(("attempt", "step", "seconds", "time"), line, strict=True))) + "\n")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        flags = [f"--workdir={tmp_path / name}" for name in ("run", "empty", "absent")]
        done, empty, absent = pool.map(lambda flag: job("goodput_report", flag), flags)
    assert done.returncode == 0 and done.stdout == TABLE, done.stdout + done.stderr
    assert "workdir: " in one_line(empty) and "has no goodput.jsonl; training writes it" in empty.stderr
    assert "workdir: " in one_line(absent) and "does not exist" in absent.stderr
