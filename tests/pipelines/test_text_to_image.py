"""A text-to-image run of latents: what may be overridden when it is opened, and sampling on several devices."""

import jax
import numpy as np
import pytest

from configs.common import CAPTIONED
from diffusion.distributed.mesh import make_mesh
from diffusion.pipelines.conversion import import_folder
from diffusion.pipelines.run import open_run
from tests.jobs import job, one_line
from tests.refusals import refused, refused_field
from tests.sd_folders import write_pipeline

DRAW = {"num": 2, "prompts": ["a red circle", "two blue squares"], "negative_prompt": "a dog", "guidance": 3.0,
        "steps": 2, "sampler": "ddim"}  # fmt: skip


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Returns the run of a pipeline that draws images of 16x16 pixels."""
    folder = tmp_path_factory.mktemp("text_to_image")
    pipeline = write_pipeline(folder / "sd15", "sd15")
    import_folder(pipeline, str(folder / "run"), lambda *of: CAPTIONED | {"sharding": {"fsdp_min_size": 0}})
    return str(folder / "run")


def one_device():
    return make_mesh(data=1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def plain(workdir):
    """Returns samples of the run on one device."""
    return open_run(workdir, mesh=one_device()).sample(**DRAW)


def test_parameters_split_over_devices(workdir, plain):
    mesh = make_mesh(data=1, fsdp=4, devices=jax.devices()[:4])
    run = open_run(workdir, mesh=mesh)
    leaves = jax.tree.leaves(run.params)
    assert sum(leaf.addressable_shards[0].data.size for leaf in leaves) < 0.5 * sum(leaf.size for leaf in leaves)
    np.testing.assert_allclose(run.sample(**DRAW), plain, atol=1e-5 * abs(plain).max())


def test_clip_skip_changes_samples(workdir, plain):
    run = open_run(workdir, mesh=one_device(), clip_skip=2)
    assert abs(run.sample(**DRAW) - plain).max() > 1e-4
    same = open_run(workdir, mesh=one_device(), clip_skip=0)
    np.testing.assert_array_equal(same.sample(**DRAW), plain)


def test_the_network_may_compute_in_half_precision(workdir, plain):
    run = open_run(workdir, mesh=one_device(), network={"dtype": "bfloat16"})
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.params)} == {"float32"}
    x, scale = run.sample(**DRAW), abs(plain).max()
    assert 1e-5 * scale < abs(x - plain).max() < 0.1 * scale
    with refused("network.width"):
        open_run(workdir, network={"width": 16})


def test_latents_are_decoded_in_tiles(workdir, plain):
    run = open_run(workdir, mesh=one_device(), autoencoder={"tile": 8})
    x = run.sample(**DRAW)
    assert x.shape == plain.shape and abs(x - plain).max() > 0  # tiles have their own statistics
    whole = open_run(workdir, mesh=one_device(), autoencoder={"tile": 16})
    np.testing.assert_array_equal(whole.sample(**DRAW), plain)


def test_flags(workdir, tmp_path):
    flags = "--num=1", "--steps=1", "--prompts=a", "--clip_skip=1", "--tiles=16", "--dtype=bfloat16", "--size=48,32"
    more = f"--out={tmp_path}", "--batch_size=1", "--sampler=ddim"
    done = job("sample", f"--workdir={workdir}", *flags, *more)
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (1, 48, 32, 3)
    for flag in ("--clip_skip=4", "--tiles=15", "--size=47"):
        done = job("sample", f"--workdir={workdir}", "--num=1", flag, f"--out={tmp_path / 'out'}")
        assert refused_field(done) == flag.partition("=")[0], one_line(done)
    assert not (tmp_path / "out").exists()
