"""The text that tools of Stable Diffusion show of a PNG file."""

import numpy as np
import pytest
from PIL import Image

from diffusion.core.types import ArraySpec, Spec
from diffusion.pipelines.png_parameters import parameters
from diffusion.pipelines.sample_files import write_samples

SETTINGS = {"workdir": "runs/sd15/", "seed": 7, "sampler": {"name": "euler_ancestral", "steps": 20},
            "guidance": {"name": "cfg", "scale": 7.5}, "negative_prompt": "a dog"}  # fmt: skip


def test_the_text():
    assert parameters(SETTINGS, (512, 768), 3, "a cat, sitting") == (
        "a cat, sitting\nNegative prompt: a dog\n"
        "Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 7, Sample: 3, Size: 768x512, Model: sd15"
    )
    plain = {**SETTINGS, "negative_prompt": None, "workdir": "runs/a, b", "clip_skip": 1}
    last = 'Steps: 20, Sampler: Euler a, CFG scale: 7.5, Seed: 7, Sample: 0, Size: 8x8, Model: "runs, 1", Clip skip: 2'
    assert parameters({**plain, "workdir": "x/runs, 1"}, (8, 8), 0) == last


@pytest.mark.parametrize(
    ("sampler", "text"),
    [
        ({"name": "dpm_solver_pp", "grid": {"name": "karras", "rho": 5}}, "DPM++ 2M, Schedule type: Karras"),
        ({"name": "dpm_solver_pp", "sde": True, "order": 3, "grid": "exponential"},
         "DPM++ 3M SDE, Schedule type: Exponential"),
        ({"name": "dpm_solver_pp", "singlestep": True, "grid": "leading"}, "dpm_solver_pp"),
        ({"name": "unipc", "grid": {"name": "to_sigma_min", "grid": "karras"}}, "UniPC, Schedule type: Karras"),
        ({"name": "sa_solver"}, "sa_solver"),
    ],
)  # fmt: skip
def test_samplers_have_the_names_of_the_tool(sampler, text):
    found = parameters({**SETTINGS, "sampler": {"steps": 4, **sampler}}, (8, 8), 0, "x")
    assert f"Steps: 4, Sampler: {text}, CFG scale" in found


@pytest.mark.parametrize("metadata", [True, False])
def test_every_file_says_how_it_was_made(metadata, tmp_path):
    prompts, x = ["a red circle", "zwei Kätzchen 🐈"], np.zeros((2, 8, 8, 3), np.float32)
    write_samples(lambda first: iter([(x, {})]), str(tmp_path), labels=None, num=2, spec=Spec(ArraySpec((8, 8, 3))),
                  settings=SETTINGS, out_format="png", prompts=prompts, metadata=metadata)  # fmt: skip
    pictures = [*sorted((tmp_path / "images").iterdir()), tmp_path / "samples.png"]
    for path, index in zip(pictures, (0, 1, 0), strict=True):
        about = {"prompt": prompts[index], "parameters": parameters(SETTINGS, (8, 8), index, prompts[index])}
        assert Image.open(path).text == (about if metadata else {})
