"""What the inspection of data prints and draws, and what it finds in a folder that is not whole."""

import re

import numpy as np
import pytest
from PIL import Image

from diffusion.core import images
from tests.jobs import job


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


def test_it_tells_and_draws(config, tmp_path):
    done = job("inspect_data", config, "--all", "--num=5", f"--out={tmp_path}/sheet.png")
    assert done.returncode == 0, done.stderr
    assert "folder: 12 examples of 8 x 8 x 3, 2 classes, no captions" in done.stdout
    assert "ignored files: 1 .md" in done.stdout and "3.0 steps of 4 examples" in done.stdout
    assert "every example can be read" in done.stdout
    assert re.search(r"values +-1.00 .+ \+1.00  mean [+-]0.0\d+, deviation 0.\d+", done.stdout)
    stages = ["read, one thread", "decode, one thread", "transform, one thread", "an example, one thread",
              "in batches, read ahead", "on the devices"]  # fmt: skip
    assert re.findall(r"images/s +[\d,]+  (.+)", done.stdout) == stages
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert sheet.shape[0] >= 96 and sheet.shape[1] >= 5 * 96 and len(np.unique(sheet)) > 50


def test_it_names_what_cannot_be_read(config, folder, tmp_path):
    (folder / "class 0" / "4.png").write_bytes(b"")
    (folder / "class 1" / "7.png").write_bytes(b"GIF89a")
    done = job("inspect_data", config, "--all", f"--out={tmp_path}/sheet.png")
    assert done.returncode == 2
    assert "class 0/4.png is empty" in done.stdout and "class 1/7.png is no image" in done.stdout
    assert done.stderr.splitlines()[-1] == "error: data: 2 of 12 examples cannot be read"
    assert not (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("flag", ["--num=0", "--out=/proc/nothing/sheet.png"])
def test_bad_flags_are_named(flag):
    done = job("inspect_data", "--config=configs/digits.py", flag)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {flag.partition('=')[0]}: ")
    assert len(done.stderr.splitlines()) == 1


def test_sheets_of_all_kinds():
    rng = np.random.default_rng(0)
    image, wide, video = (rng.uniform(-1, 1, shape) for shape in ((8, 8, 3), (8, 16, 3), (4, 8, 8, 1)))
    sheet = images.captioned([image, wide], ["a", "a long caption that takes more than one line to write"])
    pixels = images.to_uint8(image)
    assert np.array_equal(np.asarray(sheet)[2:98:12, 2:98:12], pixels)
    assert images.captioned([video], [""]).width > 4 * 96
    assert images.captioned([np.zeros(2), np.ones(2)], ["", ""]).size == (480, 480)
