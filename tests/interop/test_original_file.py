"""Runs are written as single files in the original layout and read from them. With diffusers installed (`make parity`),
its pipelines open these files."""

import importlib.util
import os

import numpy as np
import pytest

from configs.common import CAPTIONED
from diffusion.core import model_folder, single_file, tensor_file
from diffusion.core.types import Spec
from diffusion.encoders import tokenizers
from diffusion.interop import original_file, schedulers
from diffusion.interop.diffusers_models import Model
from diffusion.pipelines.conversion import export_file, export_run, import_folder
from diffusion.pipelines.run import open_run
from tests.jobs import job
from tests.refusals import refused, refused_field
from tests.single_files import FAMILIES, write_pipeline, write_single_file
from tests.text_folders import write_clip_tokenizer
from tests.tiers import slow_except


@pytest.mark.parametrize("family", slow_except(("sd2",), FAMILIES))
def test_a_file_becomes_a_run_and_the_run_a_file(family, tmp_path):
    folder = write_pipeline(tmp_path / "folder", family)
    file, again = write_single_file(tmp_path / "a.safetensors", folder), str(tmp_path / "b.safetensors")
    import_folder(file, str(tmp_path / "run"), lambda *of: CAPTIONED, tokenizer=folder)
    export_file(str(tmp_path / "run"), again, dtype="float32")
    first, second = (tensor_file.read(path, "file") for path in (file, again))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        np.testing.assert_array_equal(second[name], tensor, err_msg=name)
    first, second = single_file.read(file), single_file.read(again)
    assert first.configs.keys() == second.configs.keys()
    assert schedulers.read(first.config("scheduler")) == schedulers.read(second.config("scheduler"))
    for name in first.configs.keys() - {"scheduler"}:
        assert second.config(name) == second.config(name) | first.config(name)
    with refused("--to"):
        export_file(str(tmp_path / "run"), again)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_runs_of_a_folder_and_a_file_sample_the_same(family, tmp_path):
    folder = write_pipeline(tmp_path / "folder", family)
    file = write_single_file(tmp_path / "a.safetensors", folder)
    samples = []
    for source, tokenizer in ((folder, None), (file, f"{folder}/tokenizer")):
        run = tmp_path / os.path.basename(source).split(".")[0] / "run"
        import_folder(source, str(run), lambda *of: CAPTIONED, tokenizer=tokenizer)
        ids = {"time_ids": np.float32([[16, 16, 0, 0, 16, 16]])} if family == "sdxl" else None
        samples.append(open_run(str(run)).sample(1, prompts="a red circle", cond=ids, steps=2, guidance=2.0))
    np.testing.assert_array_equal(*samples)


@pytest.mark.slow
def test_the_job(tmp_path):
    folder = write_pipeline(tmp_path / "folder", "sd1")
    file, run = write_single_file(tmp_path / "a.safetensors", folder), str(tmp_path / "run")
    assert refused_field(job("convert", f"--from={file}", f"--to={run}")) == "--tokenizer"
    done = job("convert", f"--from={file}", "--dry_run")
    assert done.returncode == 0 and "StableDiffusionPipeline" in done.stdout, done.stderr
    done = job("convert", f"--from={file}", f"--to={run}", f"--tokenizer={folder}")
    assert done.returncode == 0, done.stderr
    half = tmp_path / "half.safetensors"
    done = job("convert", f"--from={run}", f"--to={half}")
    assert done.returncode == 0, done.stderr
    assert {tensor.dtype.name for tensor in tensor_file.read(str(half), "file").values()} == {"float16"}
    data = half.read_bytes()
    half.write_bytes(data[: len(data) // 2])
    done = job("convert", f"--from={half}", f"--to={tmp_path / 'other'}", f"--tokenizer={folder}")
    assert refused_field(done) == "--from.folder"
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd2", "sdxl"])
def test_a_file_becomes_a_run_and_the_run_a_pipeline(family, tmp_path):
    """A tokenizer of another padding, which the file is given, is written with that of the encoder."""
    folder = write_pipeline(tmp_path / "folder", family)
    file, run, again = write_single_file(tmp_path / "a.safetensors", folder), tmp_path / "run", tmp_path / "again"
    write_clip_tokenizer(tmp_path / "tokenizer")
    import_folder(file, str(run), lambda *of: CAPTIONED, tokenizer=str(tmp_path / "tokenizer"))
    export_run(str(run), str(again))
    for name in ("unet", "vae", *FAMILIES[family][1]):
        weights = "model.safetensors" if "text" in name else model_folder.WEIGHTS
        first, second = (model_folder.open_tensors(f"{path}/{name}", weights=weights) for path in (folder, again))
        assert first.keys() == second.keys()
        for key, tensor in first.items():
            np.testing.assert_array_equal(second[key], tensor, err_msg=f"{name} {key}")
    for name in FAMILIES[family][1]:
        paths = (f"{path}/{name.replace('text_encoder', 'tokenizer')}" for path in (folder, again))
        first, second = map(tokenizers.read, paths)
        assert first.pad == second.pad and first.encode("a b") == second.encode("a b")


SECTIONS = {
    "objective": {"name": "denoising", "schedule": {"name": "vp"},
                  "parameterization": {"name": "eps", "c_noise": "index"}},
    "autoencoder": {"name": "kl", "path": "models/sd15"}, "text_encoder": {"name": "clip", "path": "models/sd15"},
}  # fmt: skip
X0 = SECTIONS["objective"] | {"parameterization": {"name": "x0", "c_noise": "index"}}


@pytest.mark.parametrize(
    ("network", "changes", "field"),
    [
        ("dit", {}, "network.name"),
        ("unet_text", {"objective": {"name": "denoising", "schedule": {"name": "edm"}}}, "objective"),
        ("unet_text", {"objective": X0}, "objective.parameterization"),
        ("unet_text", {"autoencoder": None}, "autoencoder"),
        ("unet_text", {"autoencoder": {"name": "tiny", "path": "models/taesd"}}, "autoencoder"),
        ("unet_text", {"text_encoder": None}, "text_encoder"),
        ("unet_text", {"text_encoder": {"name": "t5", "path": "models/t5"}}, "text_encoder"),
        ("unet_text", {"text_encoder": {"name": "joined", "path": "models/sd3", "layout": "sd3"}}, "text_encoder"),
    ],
)
def test_a_model_that_the_layout_lacks_is_refused(network, changes, field, tmp_path):
    path = tmp_path / "a.safetensors"
    with refused(field):
        original_file.write(str(path), Model({"name": network}, Spec((8, 8, 4)), {}), SECTIONS | changes,
                            dtype="float16", title="x")  # fmt: skip
    assert not path.exists()


# Comparison with diffusers.


@pytest.mark.peers
@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_opens_a_file(family, tmp_path):
    import diffusers

    folder = write_pipeline(tmp_path / "folder", family)
    file = write_single_file(tmp_path / "file.safetensors", folder)
    expected = diffusers.DiffusionPipeline.from_pretrained(folder)
    found = type(expected).from_single_file(file, config=folder, local_files_only=True)
    for name in ("unet", "vae", *FAMILIES[family][1]):
        tensors, others = (getattr(pipeline, name).state_dict() for pipeline in (expected, found))
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            np.testing.assert_array_equal(others[key].numpy(), tensor.numpy(), err_msg=f"{name} {key}")
