"""Samples are written as they are drawn: formats, interruptions, and memory that does not grow."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from diffusion.core import images, locks
from diffusion.core.types import ArraySpec, Spec, class_labels
from diffusion.pipelines import sample_files
from diffusion.pipelines.evaluation import measure_samples
from diffusion.pipelines.sample_files import write_samples
from diffusion.training.resilience.guards import Diverged
from tests.refusals import refused

SPEC, NUM, BATCH = Spec(ArraySpec((4, 4, 1)), class_labels(10)), 23, 4
LABELS = np.arange(NUM, dtype=np.int32) % 10
SETTINGS = {"seed": 1, "num": NUM, "out_format": "npz", "metadata": False}
PIXELS = np.random.default_rng(0).integers(0, 256, (NUM, 4, 4, 1), np.uint8)


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(sample_files, "PER_FILE", 10)
    monkeypatch.setattr(sample_files, "SHOWN", 6)


class Drawing:
    """Draws `PIXELS` in batches, as a generator would; ends with an error before the sample `stop`."""

    def __init__(self, stop=NUM):
        self.stop, self.starts = stop, []

    def __call__(self, start):
        self.starts.append(start)
        for first in range(start, NUM, BATCH):
            if first + BATCH > self.stop and self.stop < NUM:
                raise KeyboardInterrupt
            yield images.from_uint8(PIXELS[first : first + BATCH]), {}


def write(out, drawing, out_format="npz", settings=None, spec=SPEC, **options):
    return write_samples(drawing, str(out), labels=LABELS, num=NUM, spec=spec, settings=settings or {"seed": 1},
                         out_format=out_format, columns=3, **{"metadata": False, **options})  # fmt: skip


def contents(out):
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_npz_files(tmp_path):
    where = write(tmp_path, Drawing())
    assert where == f"{tmp_path}/samples_00000.npz to samples_00002.npz"
    assert sorted(contents(tmp_path)) == ["samples.png", *(f"samples_{index:05d}.npz" for index in range(3))]
    found = [np.load(tmp_path / f"samples_{index:05d}.npz") for index in range(3)]
    for name, expected in (("arr_0", PIXELS), ("labels", LABELS)):
        np.testing.assert_array_equal(np.concatenate([file[name] for file in found]), expected)
    assert all(set(file) == {"arr_0", "labels", "settings"} for file in found)  # no array twice
    assert all(json.loads(str(file["settings"])) == SETTINGS for file in found)
    assert Image.open(tmp_path / "samples.png").tobytes() == images.grid(PIXELS[:6], 3).tobytes()


def test_png_files(tmp_path):
    assert write(tmp_path, Drawing(), "png") == str(tmp_path / "images")
    for index, pixels in enumerate(PIXELS):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"images/{index:06d}.png")), pixels[..., 0])
    lines = (tmp_path / "labels.csv").read_text().splitlines()
    assert lines[:3] == ["file,label", "000000.png,0", "000001.png,1"] and len(lines) == NUM + 1
    assert len(contents(tmp_path)) == NUM + 2
    named = dataclasses.replace(SPEC, conditions=class_labels(10, ["a,b", *"cdefghijk"]))
    write(tmp_path, Drawing(), "png", {"seed": 2}, spec=named)
    assert (tmp_path / "labels.csv").read_text().startswith('file,label,class\n000000.png,0,"a,b"\n000001.png,1,c\n')


@pytest.mark.parametrize(("out_format", "done"), [("npz", 10), ("png", 16)])
def test_an_interrupted_job_resumes(tmp_path, out_format, done):
    """It ends with the same files; those that it had written are not written again."""
    write(tmp_path / "whole", Drawing(), out_format)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cut", Drawing(stop=17), out_format)
    kept = contents(tmp_path / "cut")
    whole = contents(tmp_path / "whole")
    assert {name: data for name, data in kept.items() if name != "unfinished.json"}.items() <= whole.items()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").rglob("*.npz")}
    drawing = Drawing()
    write(tmp_path / "cut", drawing, out_format)
    assert drawing.starts == [done] and contents(tmp_path / "cut") == whole
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())


def test_a_job_with_other_settings_starts_over(tmp_path):
    """It removes the files of the earlier job, and no others. So does a job after one that was complete."""
    (tmp_path / "samples_of_mine.npz").write_bytes(b"")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, Drawing(stop=17), "png")
    drawing = Drawing()
    write(tmp_path, drawing, "png", {"seed": 2})
    write(tmp_path, drawing, "npz", {"seed": 2})
    write(tmp_path, drawing, "npz", {"seed": 2})
    assert drawing.starts == [0, 0, 0]
    names = ["samples.png", "samples_00000.npz", "samples_00001.npz", "samples_00002.npz", "samples_of_mine.npz"]
    assert sorted(contents(tmp_path)) == names


@pytest.mark.parametrize("start", [0, 12])
def test_samples_that_are_not_finite(tmp_path, start):
    """They are counted and not written; the files before them are."""

    def broken(first):
        for x, cond in Drawing()(first):
            bad = first + BATCH > start
            first += BATCH
            yield np.where(np.arange(len(x))[:, None, None, None] % 2 & bad, np.nan, x), cond

    with pytest.raises(Diverged, match=f"2 of the samples {start} to {start + 3} are not finite"):
        write(tmp_path, broken)
    assert {"samples_00000.npz", "samples.png"} <= contents(tmp_path).keys() or start == 0


def test_points_are_not_written_as_images(tmp_path):
    with refused("--out_format"):
        write_samples(Drawing(), str(tmp_path / "out"), labels=None, num=4, spec=Spec(ArraySpec((2,), "points")),
                      settings={}, out_format="png")  # fmt: skip
    assert not (tmp_path / "out").exists()


class Count:
    """A metric that keeps nothing."""

    kind, names, num, guidance = "samples", ("count",), 0, 1.0

    def init(self):
        return 0

    def update(self, state, images, conditions):
        return state + len(images)

    def result(self, state):
        return {"count": state}


@pytest.mark.parametrize("use", ["npz", "png", "metric"])
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path, use):
    """Images of 64 kB as floats: forty batches need no more than eight, of which all samples would take 5 MB."""
    spec, size = Spec(ArraySpec((64, 64, 4), "latent")) if use == "npz" else Spec(ArraySpec((64, 64, 1))), 10

    def drawn(num):
        for index in range(num // size):
            yield np.full((size, *spec.shape), index / 100, np.float32), {}

    def peak(num):
        tracemalloc.start()
        if use == "metric":
            assert measure_samples([Count()], drawn(num), spec)[0] == [{"count": num}]
        else:
            write_samples(lambda start: drawn(num), str(tmp_path / str(num)), labels=None, num=num, spec=spec,
                          settings={}, out_format=use, metadata=False)  # fmt: skip
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(20)  # imports
    assert peak(400) < 1.1 * peak(80) + 50_000


def test_a_second_job_in_the_folder_is_refused(tmp_path):
    with locks.hold(str(tmp_path), "--out"), refused("--out"):
        write(tmp_path, Drawing())
    write(tmp_path, Drawing())
    assert not (tmp_path / locks.NAME).exists()
