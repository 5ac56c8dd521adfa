"""Tests files that are written atomically or line by line, on a local disk and in a bucket simulated by a folder."""

import json
import os
import pathlib
import sys
import types

import fsspec
import numpy as np
import pytest
from etils import epath
from fsspec.implementations.local import LocalFileSystem
from PIL import Image

from diffusion.core import files, images
from diffusion.core.types import InputError
from diffusion.training.metrics import JsonLines, TensorBoard
from diffusion.training.resilience.goodput import Goodput, summary
from tests.refusals import refused


@pytest.fixture(params=["local", "gs://"])
def folder(request, tmp_path, monkeypatch):
    """Returns the path of a run's folder."""
    if request.param == "local":
        return str(tmp_path / "run")

    class Bucket(LocalFileSystem):
        protocol = ("gcs", "gs")

        @classmethod
        def _strip_protocol(cls, path):
            path = str(path)
            return path.replace("gs://bucket", str(tmp_path / "bucket")) if "gs://" in path else path

    monkeypatch.setattr(fsspec, "filesystem", lambda name, **_: Bucket(skip_instance_cache=True))
    return f"gs://bucket/{tmp_path.name}"  # unique, because epath caches the first file system of each kind


def test_files_are_replaced_atomically(folder):
    files.make_folder(folder, "workdir")
    path = f"{folder}/config.json"
    for text in ("one", "another"):
        with files.replace(path) as file:
            file.write(text)
        assert epath.Path(path).read_text() == text
    with pytest.raises(KeyError), files.replace(path) as file:
        file.write("incomplete")
        raise KeyError
    assert epath.Path(path).read_text() == "another"
    images.save_png(Image.new("L", (3, 2)), f"{folder}/a.png")
    assert epath.Path(f"{folder}/a.png").read_bytes()[1:4] == b"PNG"
    with files.replace(f"{folder}/x.npz", "wb") as file:
        np.savez(file, x=np.arange(3))
    assert {path.name for path in epath.Path(folder).iterdir()} == {"config.json", "a.png", "x.npz"}


def test_lines_are_kept_and_incomplete_ones_removed(folder):
    files.make_folder(folder, "workdir")
    path = epath.Path(folder) / "lines"
    lines = files.Lines(str(path))
    for number in range(5):
        lines.add(str(number))
    lines.keep(lambda line: int(line) < 3)
    lines.add("7")
    lines.close()
    assert path.read_text() == "0\n1\n2\n7\n"
    path.write_text(path.read_text() + "incomplete")
    lines = files.Lines(str(path))
    assert path.read_text() == "0\n1\n2\n7\n"
    lines.add("8")
    lines.close()
    assert path.read_text() == "0\n1\n2\n7\n8\n"


def test_paths_are_strings_or_path_objects(tmp_path):
    """Both work everywhere, and so do remote paths of `epath`."""
    folder = files.make_folder(tmp_path / "run", "workdir")
    assert folder == str(tmp_path / "run") and files.is_folder(pathlib.Path(folder), "workdir")
    with files.replace(pathlib.Path(folder) / "a") as file:
        file.write("1")
    lines = files.Lines(pathlib.Path(folder) / "b")
    lines.add("2")
    lines.close()
    images.save_png(Image.new("L", (1, 1)), pathlib.Path(folder) / "c.png")
    assert {path.name for path in pathlib.Path(folder).iterdir()} == {"a", "b", "c.png"}
    assert files.is_remote(epath.Path("gs://bucket/run")) and not files.is_remote(pathlib.Path(folder))


def test_a_remote_file_is_uploaded_about_once_a_minute(folder, monkeypatch):
    files.make_folder(folder, "workdir")
    now = [0.0]
    monkeypatch.setattr(files.time, "monotonic", lambda: now[0])
    path = epath.Path(folder) / "lines"
    lines = files.Lines(str(path))
    lines.add("1")
    assert path.exists() == (not files.is_remote(folder))
    now[0] += files.REWRITE + 1
    lines.add("2")
    assert path.read_text() == "1\n2\n"


def test_metrics_and_goodput_after_a_restart(folder):
    files.make_folder(folder, "workdir")
    for start, end in ((0, 5), (3, 7)):
        writer, meter = JsonLines(folder, start), Goodput(folder, start)
        for step in range(start + 1, end + 1):
            writer.write(step, {"loss": 1.0})
        meter.write(end)
        writer.close()
        meter.close()
    lines = (epath.Path(folder) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert summary(folder)["starts"] == 2 and summary(folder)["step"] == 7


def test_corrupt_lines_of_metrics_are_removed(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\xff\n[]\n{"loss": 2}\n{"step": 2}\n{"step": "x"}\n')
    JsonLines(str(tmp_path), 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_errors_of_tensorboard_become_os_errors(tmp_path, monkeypatch):
    error = type("ResourceExhaustedError", (Exception,), {"__module__": "tensorflow.python.framework.errors_impl"})

    class Full:
        def write_scalars(self, step, scalars):
            raise error("{{function_node Flush:CPU:0}} log: No space left on device\nand more")

    clu = types.ModuleType("clu")
    clu.metric_writers = types.SimpleNamespace(SummaryWriter=lambda workdir: Full())
    monkeypatch.setitem(sys.modules, "clu", clu)
    with pytest.raises(OSError, match=r"^log: No space left on device$"):
        TensorBoard(str(tmp_path)).write(1, {"loss": 1.0})


def test_adding_to_a_removed_file_fails(tmp_path):
    lines = files.Lines(str(tmp_path / "lines"))
    os.remove(tmp_path / "lines")
    with pytest.raises(FileNotFoundError):
        lines.add("1")


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "writes", lambda: False)
    with files.replace(str(tmp_path / "a")) as file:
        file.write("1")
    lines = files.Lines(str(tmp_path / "b"))
    lines.add("1")
    lines.close()
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_created_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with refused("--out"):
        files.make_folder(str(tmp_path / "file/x"), "--out")


def test_json_has_no_numbers_that_json_lacks(tmp_path):
    value = {"a": float("nan"), "b": (np.float32("inf"), -np.inf), "c": np.array([1.0, np.nan]), "d": {"e": 1}}
    files.write_json(tmp_path / "a.json", value)
    found = json.loads((tmp_path / "a.json").read_text(), parse_constant=pytest.fail)
    assert found == {"a": "NaN", "b": ["Infinity", "-Infinity"], "c": [1.0, "NaN"], "d": {"e": 1}}


def test_a_new_folder_is_complete_or_absent(tmp_path):
    path = tmp_path / "new"
    with pytest.raises(KeyError), files.new_folder(path, "--to") as folder:
        pathlib.Path(folder, "a").write_text("1")
        raise KeyError
    with refused("--to") as caught, files.new_folder(path, "--to") as folder:
        raise InputError("workdir", f"{folder}/a cannot be written")
    assert caught.value.problem == f"{path}/a cannot be written"
    assert not list(tmp_path.iterdir())
    path.mkdir()
    with files.new_folder(path, "--to") as folder:
        pathlib.Path(folder, "a").write_text("1")
    assert (path / "a").read_text() == "1" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("write() failed: No space left on device; at 3")]
)
def test_errors_of_writing_name_the_field(error):
    with refused("--out") as caught, files.writing("x", "--out"):
        raise error
    assert caught.value.problem == "x cannot be written: No space left on device"
    with pytest.raises(KeyError), files.writing("x", "--out"):
        raise KeyError


def test_a_full_disk_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, files.replace(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a")


def test_what_does_not_fit_is_refused_in_advance(tmp_path):
    with refused("--out"):
        files.make_folder(tmp_path / "a", "--out", size=2**60)


def test_escaped_names_are_written_as_their_bytes(tmp_path):
    with files.replace(tmp_path / "a") as file:
        file.write("caf\udcc3\udca9")
    assert (tmp_path / "a").read_bytes() == "caf\u00e9".encode()
