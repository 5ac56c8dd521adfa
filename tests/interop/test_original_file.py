"""Runs are written as single files in the original layout and read from them. With diffusers installed (`make parity`),
its pipelines open these files."""

import importlib.util

import numpy as np
import pytest

from tests.single_files import FAMILIES, write_pipeline, write_single_file

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
