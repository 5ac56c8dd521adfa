"""A text-to-image run of latents: what may be overridden when it is opened, and sampling on several devices."""

import jax
import numpy as np
import pytest

import diffusion as df
from diffusion.distributed.mesh import make_mesh
from diffusion.pipelines.build_training import build_training
from diffusion.pipelines.config import resolve
from diffusion.pipelines.run import open_run
from tests.jobs import job, one_line
from tests.refusals import refused, refused_field
from tests.text_folders import CLIP, stored_of, write_encoder
from tests.vae_folders import write_vae

PROMPTS = ["a red circle", "two blue squares"]
DRAW = {"num": 2, "prompts": PROMPTS, "negative_prompt": "a dog", "guidance": 3.0, "steps": 2}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_to_image")
    config = resolve({
        "data": {"name": "shapes", "size": 32, "captions": True, "length": 50},
        "text_encoder": {"name": "clip", "path": write_encoder(folder / "clip", stored_of(CLIP))},
        "autoencoder": {"name": "kl", "path": write_vae(folder / "vae", (32, 32, 3))},
        "objective": "denoising",
        "network": {"name": "unet_text", "width": 8, "channel_mult": (1, 2), "num_res_blocks": 1, "depth": (0, 1),
                    "num_heads": 2},
        "train": {"steps": 1, "batch_size": 2, "preview_every": 0, "cond_drop_rate": 0.1},
        "sharding": {"fsdp_min_size": 0},
        "sampler": {"name": "ddim", "steps": 2},
    })  # fmt: skip
    path = str(folder / "run")
    df.Trainer(**{**build_training(config, path), "mesh": one_device()}, workdir=path).fit()
    return path


def one_device():
    return make_mesh(data=1, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def plain(workdir):
    """The run on one device, and samples of it; its parameters are moved, because some are 0 after one step."""
    run = moved(open_run(workdir, mesh=one_device()))
    return run, run.sample(**DRAW)


def moved(run):
    def move(leaf):
        noise = np.random.default_rng(leaf.size).normal(size=leaf.shape)
        return jax.device_put(leaf + 0.1 * noise.astype(np.float32), leaf.sharding)

    run.params = jax.tree.map(move, run.params)
    return run


def test_parameters_split_over_devices(workdir, plain):
    mesh = make_mesh(data=1, fsdp=4, devices=jax.devices()[:4])
    run = moved(open_run(workdir, mesh=mesh))
    leaves = jax.tree.leaves(run.params)
    assert sum(leaf.addressable_shards[0].data.size for leaf in leaves) < 0.5 * sum(leaf.size for leaf in leaves)
    np.testing.assert_allclose(run.sample(**DRAW), plain[1], atol=1e-5 * abs(plain[1]).max())


def test_clip_skip_changes_prompts_alone(workdir, plain):
    run = moved(open_run(workdir, mesh=one_device(), clip_skip=2))
    assert abs(run.sample(**DRAW) - plain[1]).max() > 1e-4
    same = moved(open_run(workdir, mesh=one_device(), clip_skip=0))
    np.testing.assert_array_equal(same.sample(**DRAW), plain[1])


def test_the_network_may_compute_in_half_precision(workdir, plain):
    run = moved(open_run(workdir, mesh=one_device(), network={"dtype": "bfloat16"}))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(run.params)} == {"float32"}
    x, scale = run.sample(**DRAW), abs(plain[1]).max()
    assert 1e-5 * scale < abs(x - plain[1]).max() < 0.1 * scale
    with refused("network.width"):
        open_run(workdir, network={"width": 16})


def test_latents_are_decoded_in_tiles(workdir, plain):
    run = moved(open_run(workdir, mesh=one_device(), autoencoder={"tile": 16}))
    x = run.sample(**DRAW)
    assert x.shape == plain[1].shape and abs(x - plain[1]).max() > 0  # tiles have their own statistics
    whole = moved(open_run(workdir, mesh=one_device(), autoencoder={"tile": 32}))
    np.testing.assert_array_equal(whole.sample(**DRAW), plain[1])


def test_flags(workdir, tmp_path):
    flags = "--num=1", "--steps=1", "--prompts=a", "--clip_skip=1", "--tiles=16", "--dtype=bfloat16", "--size=48,32"
    done = job("sample", f"--workdir={workdir}", *flags, f"--out={tmp_path}", "--batch_size=1")
    assert done.returncode == 0, done.stderr
    assert np.load(tmp_path / "samples.npz")["arr_0"].shape == (1, 48, 32, 3)
    for flag in ("--clip_skip=4", "--tiles=15", "--size=47"):
        done = job("sample", f"--workdir={workdir}", "--num=1", flag, f"--out={tmp_path / 'out'}")
        assert refused_field(done) == flag.partition("=")[0], one_line(done)
    assert not (tmp_path / "out").exists()
