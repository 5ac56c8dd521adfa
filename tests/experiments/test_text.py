"""Text to image with the jobs: a training on captions, prompts, their files, and what is refused."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from tests.jobs import job, one_line
from tests.refusals import refused_field

TINY = (
    "--config.train.steps=1 --config.train.batch_size=8 --config.train.preview_every=0 --config.network.width=8 "
    "--config.network.depth=1 --config.network.num_heads=2 --config.text_encoder.width=8 --config.text_encoder.depth=1 "
    "--config.text_encoder.num_heads=2 --config.data.length=200 --config.data.size=32 --config.eval.data.size=32 "
    "--config.autoencoder=None --config.network.patch_size=8 --config.optimizer={'name':'adamw'}"
).split()
DRAW = ("--num=3", "--steps=2", "--guidance=2")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("text") / "run")
    done = job("train", "--config=configs/shapes_text.py", *TINY, f"--workdir={folder}")
    assert done.returncode == 0, done.stderr
    return folder


def test_prompts_are_in_the_names_and_the_metadata_of_samples(workdir, tmp_path):
    prompts = "a red circle; two blue squares/ünd?"
    done = job("sample", f"--workdir={workdir}", *DRAW, f"--prompts={prompts}", f"--out={tmp_path}", "--out_format=png",
               "--negative_prompt=a green triangle")  # fmt: skip
    assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["000000_a_red_circle.png", "000001_two_blue_squares_nd.png", "000002_a_red_circle.png"]
    text = Image.open(tmp_path / "images" / names[1]).text
    assert text["prompt"] == "two blue squares/ünd?"
    lines = text["parameters"].splitlines()
    assert lines[:2] == ["two blue squares/ünd?", "Negative prompt: a green triangle"]
    assert "CFG scale: 2, Seed: 0, Sample: 1, Size: 32x32, Model: run" in lines[2]
    with open(tmp_path / "prompts.csv", encoding="utf-8") as file:
        assert list(csv.reader(file))[:2] == [["file", "prompt"], [names[0], "a red circle"]]
    listed = tmp_path / "prompts.txt"
    listed.write_text("a red circle\n\n a blue square \n")
    done = job("sample", f"--workdir={workdir}", *DRAW, f"--prompts_file={listed}", f"--out={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "samples.npz")
    assert found["prompts"].tolist() == ["a red circle", "a blue square", "a red circle"]
    assert json.loads(str(found["settings"]))["prompts"] == ["a red circle", "a blue square"]
    assert not (tmp_path / "prompts.csv").exists()


def test_several_samples_of_each_prompt(workdir, tmp_path):
    """They are those of a list of prompts that repeats each."""
    found = []
    for flags in (["--prompts=a red circle; a blue square", "--per_prompt=2"],
                  ["--prompts=a red circle; a red circle; a blue square; a blue square", "--num=4"]):  # fmt: skip
        done = job("sample", f"--workdir={workdir}", "--steps=2", *flags, f"--out={tmp_path}")
        assert done.returncode == 0, done.stderr
        found.append(np.load(tmp_path / "samples.npz"))
    assert found[0]["prompts"].tolist() == found[1]["prompts"].tolist()
    np.testing.assert_array_equal(found[0]["arr_0"], found[1]["arr_0"])
    assert (found[0]["arr_0"][0] != found[0]["arr_0"][1]).any()


def test_samples_of_another_size(workdir, tmp_path):
    done = job("sample", f"--workdir={workdir}", *DRAW, "--prompts=a red circle", f"--out={tmp_path}", "--size=16,40")
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (3, 16, 40, 3)


def test_bad_flags_are_one_line(workdir, tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes("a naïve cat".encode("latin-1"))
    for flags, field in (
        ([f"--prompts_file={tmp_path}/empty"], "--prompts_file"),
        ([f"--prompts_file={tmp_path}/latin"], "--prompts_file"),
        ([f"--prompts_file={tmp_path}/none"], "--prompts_file"),
        (["--prompts=;"], "--prompts"),
        (["--prompts=a", f"--prompts_file={tmp_path}/empty"], "--prompts_file"),
        (["--negative_prompt=a", "--guidance=1"], "--negative_prompt"),
        (["--size=12"], "--size"),
        (["--size=32,x"], "--size"),
        (["--crop=1,2"], "--crop"),
        (["--per_prompt=2", "--prompts=a"], "--per_prompt"),  # with --num
        (["--clip_skip=1"], "--clip_skip"),
        (["--tiles=16"], "--tiles"),
        (["--original_size=0"], "--original_size"),
        (["--size=32", "--sweep=steps=1", "--metrics"], "--size"),
    ):
        done = job("sample", f"--workdir={workdir}", *DRAW, *flags, f"--out={tmp_path / 'out'}")
        assert refused_field(done) == field, one_line(done)
    assert not (tmp_path / "out").exists()


def test_captions_without_an_encoder_are_refused(tmp_path):
    done = job(
        "train", "--config=configs/shapes_text.py", "--config.text_encoder=None", f"--workdir={tmp_path / 'run'}"
    )
    assert refused_field(done) == "data.captions" and not (tmp_path / "run").exists()
