"""The content of the results page of a sweep. `test_report_in_browser.py` tests how it behaves."""

import base64
import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from launch import report, results
from launch.results import ResultRow
from tests.launch.runs import HOSTILE, logged, png, write_run, write_sweep
from tests.refusals import refused, refused_field

ROOT = pathlib.Path(__file__).parents[2]


class Page(html.parser.HTMLParser):
    """Parses a page into its tags, its embedded data and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.data, self.text = [], "", ""
        self.feed(pathlib.Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, text):
        tag, attributes = self.tags[-1] if self.tags else ("", {})
        if tag == "script" and attributes.get("type") == "application/json":
            self.data += text
        elif tag != "script":
            self.text += text


def write_page(root, **keywords):
    page = Page(report.write_html(root, results.read(root), **keywords))
    return page, json.loads(page.data)


def test_page_contains_overrides_and_results(tmp_path):
    points = {
        "a": {"optimizer.lr": 0.1, "train.flag": True, "seed": 1},
        "b": {"optimizer.lr": "auto", "train.flag": True},
        "c=1": {"train.flag": True, "optimizer.lr": float("nan"), "seed": [1]},
    }
    write_sweep(tmp_path / "s", points, config="configs/x.py", commit="0123", clean=False)
    write_run(
        tmp_path / "s/a", events=("started", 0), metrics=[{**line, "loss_t0": 1} for line in logged((100, 200))],
        evaluation={"fid": 2.5}, previews=(100, 200),
    )  # fmt: skip
    write_run(tmp_path / "s/b", events=("started", 1))
    page, data = write_page(tmp_path / "s")
    a, b, c = data["runs"]
    assert data["title"] == "s" and page.text.count("s") and "1 done, 1 failed, 1 waiting" in data["counts"]
    assert (data["config"], data["commit"], data["clean"]) == ("configs/x.py", "0123", False)
    assert [key["short"] for key in data["varied"]] == ["lr", "seed"] and data["shared"] == {"train.flag": "true"}
    assert [run["overrides"] for run in (a, b, c)] == [[0.1, 1], ["auto", None], ["NaN", "[1]"]]
    # Final metrics come before logged details.
    assert [metric["name"] for metric in data["metrics"]] == ["loss", "fid", "images_per_second", "loss_t0"]
    assert a["metrics"] == [0.005, 2.5, 100.0, 1] and b["metrics"] == [None] * 4
    assert a["curve"] == {"step": [100, 200], "loss": [0.01, 0.005], "images_per_second": [100, 100], "loss_t0": [1, 1]}
    assert base64.b64decode(a["preview"]) == png() and not b["preview"]
    assert (a["folder"], c["folder"]) == ("./a/", "./c%3D1/")
    assert b["note"] == "error: 1" and b["state"] == "failed"


NAMES = [
    HOSTILE, "</script><script>alert(2)</script>", "<!--<script>", "a'\"&amp;<b>", "\u2028\U0001f600\u00e9", "{{data}}",
    "javascript:alert(3)",
]  # fmt: skip


def test_no_text_of_a_run_becomes_markup(tmp_path):
    points = {name: {f"key.{name}": name} for name in NAMES}
    write_sweep(tmp_path, points, config=HOSTILE, commit=HOSTILE)
    for name in NAMES[:2]:
        folder = write_run(tmp_path / name, metrics=[{"step": 1, HOSTILE: 2.0}])
        ended = {"time": 1, "event": "ended", "code": 1, "message": HOSTILE}
        (folder / "events.jsonl").write_text(json.dumps(ended))
    page, data = write_page(tmp_path, title=f"{HOSTILE}{{{{data}}}}")
    assert [run["name"] for run in data["runs"]] == NAMES
    assert data["runs"][0]["note"] == HOSTILE and data["metrics"][0]["name"] == HOSTILE
    assert not set("<>&") & set(page.data)
    plain = write_sweep(tmp_path / "plain", {"a": {}})
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in write_page(plain)[0].tags]
    assert page.text.count(f"{HOSTILE}{{{{data}}}}") == 2  # the title and the heading
    assert all(run["folder"].startswith("./") for run in data["runs"])


def test_page_is_self_contained(tmp_path):
    page, _ = write_page(write_sweep(tmp_path, {"a": {}}))
    given = {key for _, attributes in page.tags for key in attributes}
    assert not given & {"src", "href", "srcset", "style"} and "link" not in [tag for tag, _ in page.tags]
    text = (tmp_path / "results.html").read_text()
    assert set(re.findall(r"\w+://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}  # the name of the SVG namespace
    assert not re.search(r"@import|url\(|\bimport\(|fetch\(", text)
    assert "default-src 'none'" in text


def test_long_curves_are_subsampled_including_both_ends(tmp_path):
    curve = list(range(5000))
    for most in (2, 3, 50, 200):
        found = report.subsample(curve, most)
        assert len(found) == most == len(set(found)) and (found[0], found[-1]) == (0, 4999)
        assert found == sorted(found)
    assert report.subsample(curve[:7], 200) == curve[:7] and report.subsample([], 2) == []
    root = write_sweep(tmp_path, {"a": {}})
    write_run(root / "a", metrics=logged(range(1, 1500)))
    (a,) = write_page(root)[1]["runs"]
    assert len(a["curve"]["loss"]) == len(a["curve"]["step"]) == 200 and a["curve"]["step"][-1] == 1499


def test_page_of_500_runs_stays_small(tmp_path):
    root = write_sweep(tmp_path, {f"run{number}": {"seed": number} for number in range(500)})
    rows = [
        ResultRow(f"run{n}", {"seed": n}, "done", 2000, metrics={"loss": 1.0}, curve=logged(range(1, 2001)))
        for n in range(500)
    ]
    path = report.write_html(root, rows)
    assert all(len(run["curve"]["loss"]) == 80 for run in json.loads(Page(path).data)["runs"])
    assert os.path.getsize(path) < 2**21


def test_previews_that_cannot_be_shown_are_listed(tmp_path, monkeypatch):
    valid = png()
    monkeypatch.setattr(report, "MAX_IMAGE_BYTES", len(valid) + 50)
    monkeypatch.setattr(report, "MAX_TOTAL_BYTES", 2 * len(valid) + 10)
    contents = {
        "a": valid,
        "large": valid + bytes(99),
        "cut": valid[:-20],
        "text": b"<svg/>",
        "b": valid,
        "late": valid,
    }
    root = write_sweep(tmp_path, {name: {} for name in [*contents, "none"]})
    for name, content in contents.items():
        write_run(root / name, previews=(5,))
        (root / name / "previews/step_0000005.png").write_bytes(content)
    os.makedirs(root / "none/previews/step_0000007.png")
    found = {run["name"]: (bool(run["preview"]), run["problem"]) for run in write_page(root)[1]["runs"]}
    assert found["a"] == found["b"] == (True, "")
    for name in ("large", "cut", "text", "late", "none"):
        shown, problem = found[name]
        assert not shown and problem.startswith("step_00000"), name


@pytest.mark.parametrize(
    ("metric", "better"),
    [
        ("loss", "lower"), ("loss_t0", "lower"), ("energy_distance_ratio", "lower"), ("bits_per_dim", "lower"),
        ("evaluation.FID", "lower"), ("path_curvature", "lower"), ("svc_accuracy", "higher"),
        ("readable_shapes", "higher"), ("images_per_second", "higher"),
        ("grad_norm", None), ("svc_on_real", None), ("glossary", None),
        ("loss_of_accuracy", None),
    ],
)  # fmt: skip
def test_direction_follows_from_the_name_of_a_metric(metric, better):
    assert report.direction(metric) == better


def test_failed_write_keeps_the_old_page(tmp_path, monkeypatch):
    root = write_sweep(tmp_path, {"a": {}})
    path = pathlib.Path(report.write_html(root, results.read(root), "old"))
    old = path.read_text()
    monkeypatch.setattr(report.files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with refused("workdir"):
        report.write_html(root, results.read(root), "new")
    assert path.read_text() == old and not list(root.glob("*.partial"))


def test_job_writes_page_and_table(tmp_path):
    write_sweep(tmp_path / "s", {"a": {}})
    command = [sys.executable, "-m", "launch.report"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    done, failed = (
        subprocess.run([*command, f"--workdir={folder}"], capture_output=True, cwd=ROOT, env=environment, text=True)
        for folder in (tmp_path / "s", tmp_path)
    )
    assert done.stdout.split() == [f"{tmp_path}/s/results.csv", f"{tmp_path}/s/results.html"], done.stderr
    assert all(os.path.getsize(path) for path in done.stdout.split())
    assert refused_field(failed) == "workdir"
