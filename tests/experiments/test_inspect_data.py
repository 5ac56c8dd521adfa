"""The job that shows data: what it prints and draws, and how it reports unreadable files."""

import re

import numpy as np
import pytest
from PIL import Image

from diffusion.core import images
from diffusion.core.build import build
from diffusion.core.types import ArraySpec, InputError, Spec, class_labels
from diffusion.pipelines import inspection
from tests.jobs import job
from tests.refusals import refused_field


@pytest.fixture
def folder(tmp_path):
    rng, root = np.random.default_rng(0), tmp_path / "images"
    for number in range(12):
        path = root / f"class {number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    (root / "notes.md").touch()
    return root


CONFIG = """
from ml_collections import ConfigDict
from configs import digits

def get_config():
    config = digits.get_config()
    config.data = ConfigDict({{"name": "folder", "path": {path!r}, "size": 8, "on_error": "raise"}})
    config.train.batch_size = 4
    return config
"""


@pytest.fixture
def config(folder, tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(path=str(folder)))
    return f"--config={path}"


def test_buckets_are_counted(folder):
    Image.new("RGB", (40, 10)).save(folder / "class 0" / "wide.png")
    source = build("data", {"name": "folder", "path": str(folder), "size": 16, "buckets": 4})
    assert inspection.describe(source).startswith("13 examples of 16 x 16 x 3 and other sizes, 2 classes")
    assert inspection.buckets(source, 8) == ["12 x 20: 12 images, 1.5 batches", "8 x 32: 1 images, 0.1 batches"]
    assert inspection.buckets(build("data", {"name": "folder", "path": str(folder), "size": 16}), 8) == []


@pytest.mark.slow
def test_it_describes_and_draws_the_examples(config, tmp_path):
    done = job("inspect_data", config, "--all", "--num=5", f"--out={tmp_path}/sheet.png")
    assert done.returncode == 0, done.stderr
    assert "folder: 12 examples of 8 x 8 x 3, 2 classes, no captions" in done.stdout
    assert "classes  0 class 0, 1 class 1" in done.stdout
    assert "ignored files: 1 .md" in done.stdout and "3.0 steps of 4 examples" in done.stdout
    assert re.search(r"values +-1.00 .+ \+1.00  mean [+-]0.0\d+, standard deviation 0.\d+", done.stdout)
    stages = ["read, one thread", "decode, one thread", "transform, one thread", "an example, one thread",
              "in batches, read ahead", "on the devices"]  # fmt: skip
    assert re.findall(r"images/s +[\d,]+  (.+)", done.stdout) == stages
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert sheet.shape[0] >= 96 and sheet.shape[1] >= 5 * 96 and len(np.unique(sheet)) > 50


def test_it_names_unreadable_files(config, folder, tmp_path):
    (folder / "class 0" / "4.png").write_bytes(b"")
    (folder / "class 1" / "7.png").write_bytes(b"GIF89a")
    done = job("inspect_data", config, "--all", f"--out={tmp_path}/sheet.png")
    assert done.returncode == 2
    bad = [line for line in done.stdout.splitlines() if line.startswith("bad ")]
    assert ["class 0/4.png" in bad[0], "class 1/7.png" in bad[1], len(bad)] == [True, True, 2]
    assert done.stderr.splitlines()[-1].startswith("error: data: 2 of 12 ")
    assert not (tmp_path / "sheet.png").exists()


def test_all_finds_what_training_would_meet():
    """Errors of any type, numbers that are not finite, and examples that the source replaces."""

    class Source:
        def __len__(self):
            return 5

        def __getitem__(self, index):
            if index < 2:
                raise InputError("data", "no image") if index else KeyError("lost")
            return {"x": np.float32([np.nan if index == 2 else 0]), "cond": {}, "skipped": np.bool_(index == 3)}

    found = list(inspection.unreadable_examples(Source()))
    assert found == ["example 0: KeyError: 'lost'", "no image", "example 2 is not finite", None]


@pytest.mark.parametrize("flag", ["--num=0", "--out=/proc/nothing/sheet.png"])
def test_invalid_flags_are_named(flag):
    assert refused_field(job("inspect_data", "--config=configs/digits.py", flag)) == flag.partition("=")[0]


def test_captions_are_the_examples_own_or_their_classes(digits):
    named = Spec(ArraySpec((2,), "points"), class_labels(2, ("zero", "one")))
    example = {"x": None, "cond": {"label": np.int32(1)}}
    assert inspection.caption_of({**example, "caption": "a digit"}, named) == "a digit"
    assert inspection.caption_of(example, named) == "one"
    assert inspection.caption_of(example, digits.spec) == "1"
    assert inspection.caption_of({"x": None, "cond": {}}, digits.spec) == ""


def test_sheets_of_images_videos_and_points():
    rng = np.random.default_rng(0)
    image, wide, video = (rng.uniform(-1, 1, shape) for shape in ((8, 8, 3), (8, 16, 3), (4, 8, 8, 1)))
    sheet = images.captioned([image, wide], ["a", "a long caption that takes more than one line to write"])
    pixels = images.to_uint8(image)
    assert np.array_equal(np.asarray(sheet)[2:98:12, 2:98:12], pixels)
    assert images.captioned([video], [""]).width > 4 * 96
    assert images.captioned([np.zeros(2), np.ones(2)], ["", ""]).size == (480, 480)
