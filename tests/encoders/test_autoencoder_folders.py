"""Autoencoders in model folders: closed forms, round trips and refusals. With diffusers installed (`make parity`),
outputs, gradients, tiles and folders agree with its models."""

import dataclasses
import functools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffusion.core.build import build
from diffusion.encoders import autoencoder_folder
from diffusion.encoders.autoencoder_folder import Scale, Stored
from diffusion.encoders.tiling import one_by_one, tiled
from tests.refusals import refused

TRUNK = {"block_out_channels": (6, 12), "layers_per_block": 1, "norm_num_groups": 3}
SHAPE = (12, 8, 3)
SECTIONS = {
    "kl": TRUNK | {"name": "autoencoder_kl", "latent_channels": 2},
    "sd3": TRUNK | {"name": "autoencoder_kl", "latent_channels": 2, "use_quant_conv": False,
                    "use_post_quant_conv": False, "mid_block_add_attention": False},
    "vq": TRUNK | {"name": "autoencoder_vq", "latent_channels": 3, "num_vq_embeddings": 16, "vq_embed_dim": 2},
    "fsq": TRUNK | {"name": "autoencoder_vq", "latent_channels": 3, "fsq_levels": (4, 3)},
    "tiny": {"name": "autoencoder_tiny", "encoder_block_out_channels": (6, 6), "num_encoder_blocks": (1, 1),
             "decoder_block_out_channels": (4, 4), "num_decoder_blocks": (1, 0)},
}  # fmt: skip
SCALES = {"kl": Scale(0.5, latents_mean=(1.0, 2.0), latents_std=(3.0, 4.0)), "sd3": Scale(1.5305, 0.0609),
          "tiny": Scale(1.0, 0.0)}  # fmt: skip


@functools.cache
def stored_of(kind):
    network = build("networks", SECTIONS[kind], shape=SHAPE)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    params = jax.tree.map(lambda like: rng.normal(size=like.shape).astype(np.float32) / 4, shapes)
    return Stored(SECTIONS[kind], params, SHAPE, SCALES.get(kind, Scale(2.0)))


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @functools.cache
    def write(kind):
        folder = tmp_path_factory.mktemp(kind)
        autoencoder_folder.write(str(folder), stored_of(kind))
        return folder

    return write


def part(kind):
    return SECTIONS[kind]["name"].removeprefix("autoencoder_")


def read(folder, kind, shape=SHAPE, **options):
    return build("autoencoders", {"name": part(kind), "path": str(folder), **options}, shape=shape)


@pytest.mark.parametrize("kind", SECTIONS)
def test_a_folder_is_read_as_it_was_written(kind, folder_of, tmp_path):
    stored, folder = stored_of(kind), folder_of(kind)
    again, _ = autoencoder_folder.read(str(folder), stored.network["name"], SHAPE)
    assert {key: again.network[key] for key in stored.network} == stored.network and again.scale == stored.scale
    jax.tree.map(np.testing.assert_array_equal, again.params, stored.params)
    autoencoder_folder.write(str(tmp_path), again)
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()


def test_latents_have_unit_scale(folder_of):
    """They are (z - shift) * factor, where z is the mean or a sample of the posterior."""
    moments = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
    mean, log_variance = moments[..., :2], moments[..., 2:]
    key = jax.random.key(1)
    z = mean + np.exp(log_variance / 2.0) * np.asarray(jax.random.normal(key, mean.shape))
    autoencoder = read(folder_of("kl"), "kl")
    shift, factor = np.array([1.0, 2.0]), 0.5 / np.array([3.0, 4.0])
    np.testing.assert_allclose(autoencoder.sample(moments, None), (mean - shift) * factor, rtol=1e-5)
    np.testing.assert_allclose(autoencoder.sample(moments, key), (z - shift) * factor, rtol=1e-4)


def test_tiles():
    """Tiles cover the image in place, and are blended by a linear ramp."""
    x = np.random.default_rng(0).normal(size=(2, 13, 18, 1)).astype(np.float32)
    whole = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    mean = lambda x: jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)  # noqa: E731

    def double(x):
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)

    @jax.jit
    def results(x):
        return tiled(double, x, 8, 2, 16, 4), one_by_one(double)(x), tiled(mean, x[:, :8, :12], 8, 4, 8, 4)

    in_tiles, in_slices, means = results(x)
    np.testing.assert_allclose(in_tiles, whole, rtol=1e-6)
    np.testing.assert_array_equal(in_slices, whole)
    first, second, third = (x[:, :8, i : min(i + 8, 12)].mean((1, 2, 3))[:, None] for i in (0, 4, 8))
    ramp = np.arange(4) / 4
    row = np.concatenate([np.repeat(first, 4, 1), first * (1 - ramp) + second * ramp,
                          second * (1 - ramp) + third * ramp], axis=1)  # fmt: skip
    np.testing.assert_allclose(means[:, 0, :, 0], row, rtol=1e-5)


def test_parts_of_a_batch(folder_of):
    """Slices change nothing, and tiles little; the digest depends on the weights and the scale alone."""
    folder = folder_of("tiny")
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, size=(2, 12, 16, 3)).astype(np.float32))

    def outputs(**options):
        autoencoder = read(folder, "tiny", **options)
        z = jax.jit(autoencoder.encode)(autoencoder.params, x, None)
        return z, jax.jit(autoencoder.decode)(autoencoder.params, z), autoencoder.digest

    whole, sliced = outputs(), outputs(slices=True, tile=16)
    for a, b in zip(whole[:2], sliced[:2], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert whole[0].shape == (2, 6, 8, 4) and whole[1].shape == x.shape and whole[2] == sliced[2]
    stored = stored_of("tiny")
    one_changed = jax.tree.map(np.array, stored.params)
    one_changed["decoder"]["layers_0"]["bias"][-1] += 1e-6
    for other in ({"params": one_changed}, {"scale": Scale(1.5, 0.0)}, {"scale": Scale(1.0, 0.1)}):
        assert autoencoder_folder.digest(dataclasses.replace(stored, **other)) != whole[2]


def changed(folder, tmp_path, config=None, tensors=None):
    """Returns a copy of a folder with one of its files changed."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    path = copy / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))
    if tensors:
        path = copy / "diffusion_pytorch_model.safetensors"
        safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(path)), path)
    return copy


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("vq", {"norm_type": "spatial"}),
        ("vq", {"_class_name": "AutoencoderDC"}),
        ("vq", {"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}),
        ("kl", {"act_fn": "relu"}),
        ("kl", {"out_channels": 1}),
        ("kl", {"scaling_factor": 0}),
        ("kl", {"scaling_factor": math.nan}),
        ("kl", {"latents_mean": [1.0]}),
        ("kl", {"block_out_channels": [6, 13]}),
        ("kl", {"latent_channels": "2"}),
        ("kl", {"layers_per_block": 2}),
        ("tiny", {"upsample_fn": "bilinear"}),
    ],
)
def test_an_entry_that_is_not_supported_is_named(kind, config, folder_of, tmp_path):
    folder = changed(folder_of(kind), tmp_path, config)
    with refused("autoencoders.path") as caught:
        read(folder, kind)
    name = {"layers_per_block": "resnets.2", "block_out_channels": "norm_num_groups", "_class_name": "AutoencoderDC",
            "out_channels": "in_channels"}  # fmt: skip
    assert name.get(next(iter(config)), next(iter(config))) in str(caught.value)


def test_data_and_weights_that_do_not_fit_are_refused(folder_of, tmp_path):
    for shape, words in (((9, 8, 3), "9 x 8"), ((12, 8, 1), "the data is 1"), ((2,), "images")):
        with refused("autoencoders.path") as caught:
            read(folder_of("kl"), "kl", shape)
        assert words in str(caught.value)
    with refused("autoencoders.path") as caught:
        read(folder_of("kl"), "kl", variant="fp16")
    assert "no variant 'fp16'" in str(caught.value)
    for options in ({"tile": 7}, {"tile": 8, "overlap": 0.1}, {"tile": 8, "overlap": 0.75}):
        with refused("autoencoders.tile"):
            read(folder_of("kl"), "kl", **options)

    name = "encoder.conv_in.bias"
    folder = changed(
        folder_of("kl"), tmp_path, tensors=lambda tensors: tensors | {name: np.full(6, np.nan, np.float32)}
    )
    with refused("autoencoders.path") as caught:
        read(folder, "kl")
    assert name in str(caught.value) and "NaN" in str(caught.value)
    (folder / "diffusion_pytorch_model.safetensors").rename(folder / "diffusion_pytorch_model.bin")
    with refused("autoencoders.path") as caught:
        read(folder, "kl")
    assert "is a pickle" in str(caught.value)
    with refused("shift_factor"):
        autoencoder_folder.write(str(tmp_path), Stored(SECTIONS["vq"], stored_of("vq").params, SHAPE, Scale(1.0, 0.5)))
    with refused("network.name"):
        autoencoder_folder.write(str(tmp_path), Stored({"name": "unet"}, {}, SHAPE))


def test_a_folder_that_is_not_the_model_is_explained(folder_of, tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    for folder, words in (
        (folder_of("vq"), "set autoencoder.name to vq"),
        (tmp_path / "run", "experiments.convert --from="),
        (tmp_path / "none", "no folder"),
    ):
        with refused("autoencoders.path") as caught:
            read(folder, "kl")
        assert words in caught.value.problem


@pytest.mark.parametrize("width", [2, 4])
def test_names_and_shapes_of_earlier_files(width, folder_of, tmp_path):
    """Attention of before diffusers 0.13, as linear layers or as the 1x1 convolutions of latent diffusion."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(tensors):
        found = {}
        for name, tensor in tensors.items():
            for new, before in old.items():
                if f".{new}." in name:
                    name = name.replace(f".{new}.", f".{before}.")
                    tensor = tensor[:, :, None, None] if width == 4 and tensor.ndim == 2 else tensor
            found[name] = tensor
        return found

    folder = changed(folder_of("kl"), tmp_path, {"_diffusers_version": "0.6.0", "forgotten": 1}, renamed)
    assert read(folder, "kl").digest == read(folder_of("kl"), "kl").digest
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    (pipeline / "model_index.json").write_text("{}")
    (pipeline / "vae").symlink_to(folder)
    assert read(pipeline, "kl").shape == (6, 4, 2)


THREE = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
TWO = {name: types[:2] for name, types in THREE.items()}
ODD = {"block_out_channels": (6, 9, 15), "norm_num_groups": 3, "sample_size": 16, **THREE}
PEERS = {
    "SD 1.5": ("AutoencoderKL", ODD | {"layers_per_block": 2}),
    "SD 3": ("AutoencoderKL", ODD | {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 5,
                                     "scaling_factor": 1.5305, "shift_factor": 0.0609}),
    "no attention": ("AutoencoderKL", ODD | {"mid_block_add_attention": False, "latents_mean": [0.1, 0.2, -0.3, 0.4],
                                             "latents_std": [1.0, 2.0, 3.0, 4.0], "scaling_factor": 0.5}),
    "VQ": ("VQModel", ODD | {"num_vq_embeddings": 11, "vq_embed_dim": 2}),
    "TAESD": ("AutoencoderTiny", {"encoder_block_out_channels": (6, 6, 6), "num_encoder_blocks": (1, 2, 1),
                                  "decoder_block_out_channels": (5, 5, 5), "num_decoder_blocks": (2, 1, 1)}),
}  # fmt: skip
MAKERS = {"AutoencoderKL": "kl", "VQModel": "vq", "AutoencoderTiny": "tiny"}


def peer_of(name):
    """Returns a model of diffusers whose parameters are random and of a size that keeps its outputs near 1."""
    import diffusers
    import torch

    kind, options = PEERS[name]
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**options).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or key.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embedding" in key:
                parameter.copy_(torch.randn_like(parameter))
            if "conv_in" in key:  # the first norms then depend on their epsilon
                parameter.mul_(3e-3)
    return model, MAKERS[kind]


def nchw(x):
    import torch

    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1))


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_outputs_and_gradients_agree_with_diffusers(name, tmp_path):
    import torch

    model, part = peer_of(name)
    model.save_pretrained(str(tmp_path))
    shape = (12, 20, 3)
    autoencoder = build("autoencoders", {"name": part, "path": str(tmp_path)}, shape=shape)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(2, *shape)).astype(np.float32)
    z = rng.normal(size=(2, *autoencoder.shape)).astype(np.float32)
    weights = rng.normal(size=x.shape).astype(np.float32)

    @jax.jit
    def ours(params, x, z):
        def loss(params, x):
            latents = autoencoder.encode(params, x, None)
            return jnp.mean(weights * autoencoder.decode(params, latents)), latents

        grads, latents = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return autoencoder.posterior(params, x), latents, autoencoder.decode(params, z), *grads

    moments, latents, decoded, grads, grad_x = ours(autoencoder.params, x, z)

    config = model.config
    scale, shift = config.scaling_factor, config.get("shift_factor") or 0
    if config.get("latents_mean") is not None:
        mean, std = (torch.tensor(config[key])[:, None, None] for key in ("latents_mean", "latents_std"))
        unscaled, scaled = (lambda z: z * std / scale + mean), (lambda z: (z - mean) * scale / std)
    else:
        unscaled, scaled = (lambda z: z / scale + shift), (lambda z: (z - shift) * scale)
    theirs_x = nchw(x).requires_grad_()
    encoded = model.encode(theirs_x)
    encoded, expected = (encoded.latents, encoded.latents) if part != "kl" else (
        encoded.latent_dist.mode(), encoded.latent_dist.parameters)  # fmt: skip
    np.testing.assert_allclose(moments, nhwc(expected), atol=1e-4)
    np.testing.assert_allclose(latents, nhwc(scaled(encoded)), atol=1e-4)
    np.testing.assert_allclose(decoded, nhwc(model.decode(unscaled(nchw(z))).sample), atol=1e-4)
    (nchw(weights) * model.decode(encoded).sample).mean().backward()
    np.testing.assert_allclose(grad_x, nhwc(theirs_x.grad), atol=1e-4)
    flat = autoencoder_folder.tensors.to_foreign(autoencoder_folder._pairs(grads), jax.device_get(grads))
    theirs = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert flat.keys() == theirs.keys() and max(abs(value).max() for value in flat.values()) > 1e-2
    for key, value in flat.items():
        np.testing.assert_allclose(value, 0 if theirs[key] is None else theirs[key].numpy(), atol=1e-4, err_msg=key)


@pytest.mark.peers
@pytest.mark.parametrize("name", PEERS)
def test_diffusers_reads_what_is_written(name, tmp_path):
    """The weights return bit for bit, and the entries of config.json that diffusers has written."""
    import diffusers

    model, part = peer_of(name)
    model.save_pretrained(str(tmp_path / "theirs"))
    stored, _ = autoencoder_folder.read(str(tmp_path / "theirs"), f"autoencoder_{part}", (16, 16, 3))
    autoencoder_folder.write(str(tmp_path / "ours"), stored)
    again, problems = getattr(diffusers, PEERS[name][0]).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(problems.values()), problems
    for key, tensor in model.state_dict().items():
        np.testing.assert_array_equal(again.state_dict()[key], tensor)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("theirs", "ours")]
    kept = configs[0].keys() - {"block_out_channels"} if part == "tiny" else configs[0].keys()
    assert {key: configs[1][key] for key in kept} == {key: configs[0][key] for key in kept}


@pytest.mark.peers
def test_tiles_agree_with_diffusers(tmp_path):
    """Also where the last tiles are smaller than their overlap."""
    model, part = peer_of("SD 1.5")
    model.save_pretrained(str(tmp_path))
    model.enable_tiling()
    model.enable_slicing()
    shape = (40, 28, 3)
    autoencoder = build("autoencoders", {"name": part, "path": str(tmp_path), "tile": 16, "slices": True}, shape=shape)
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(2, *shape)).astype(np.float32)
    z = rng.normal(size=(2, *autoencoder.shape)).astype(np.float32)
    params = autoencoder.params
    expected = model.encode(nchw(x)).latent_dist.parameters
    np.testing.assert_allclose(jax.jit(autoencoder.posterior)(params, x), nhwc(expected), atol=1e-4)
    expected = model.decode(nchw(z) / model.config.scaling_factor).sample
    np.testing.assert_allclose(jax.jit(autoencoder.decode)(params, z), nhwc(expected), atol=1e-4)
    model.disable_tiling()
    whole = model.decode(nchw(z) / model.config.scaling_factor).sample
    assert abs(whole - expected).max() > 1e-2  # tiles make a difference


@pytest.mark.peers
def test_stable_diffusion_in_full_size_agrees_with_diffusers(tmp_path):
    """The architecture of Stable Diffusion 1.5, with random weights, at 64 x 64 pixels."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    types = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    model = AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512, **types).eval()
    model.save_pretrained(str(tmp_path))
    autoencoder = read(tmp_path, "kl", (64, 64, 3))
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, size=(1, 64, 64, 3)).astype(np.float32)
    z = rng.normal(size=(1, 8, 8, 4)).astype(np.float32)
    with torch.no_grad():
        moments = nhwc(model.encode(nchw(x)).latent_dist.parameters)
        decoded = nhwc(model.decode(nchw(z) / 0.18215).sample)
    np.testing.assert_allclose(jax.jit(autoencoder.posterior)(autoencoder.params, x), moments, atol=1e-4)
    np.testing.assert_allclose(jax.jit(autoencoder.decode)(autoencoder.params, z), decoded, atol=1e-4)
    assert moments.std() > 0.1 and decoded.std() > 0.1
