"""Folders of diffusers: what we write we read back, what does not fit is named; and with the peer installed (`make
parity`), its models and ours are one: outputs, gradients, weights and images."""

import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffusion.core.build import build
from diffusion.core.types import InputError, Spec
from diffusion.interop import diffusers_models as models
from diffusion.interop.diffusers_models import Model

UNET = {"name": "unet", "width": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,), "head_dim": 8,
        "groups": 4}  # fmt: skip
DIT = {"name": "dit", "patch_size": 2, "width": 16, "depth": 3, "num_heads": 2, "freq_shift": True}
UNETS = {
    "ddpm": {"scale_shift": False, "asymmetric_padding": True, "head_dim": None, "freq_shift": True, "sin_first": True,
             "epsilon": 1e-6},
    "adm": {"resample": "residual", "outputs": 2, "num_res_blocks": 2},
    "classes": {"attention_resolutions": (), "null_class": False},
    "null class": {"attention_resolutions": (8, 4)},
    "no attention": {"attention_resolutions": (), "middle_attention": False, "scale_shift": False},
    "three levels": {"channel_mult": (1, 1, 2), "attention_resolutions": (8, 2), "resample": "residual", "scale_shift": False},
    "mixed": {"attention_resolutions": (), "resample": "residual", "asymmetric_padding": False},
}  # fmt: skip
DITS = {"S/2": {}, "B/4": {"patch_size": 4, "outputs": 2}, "learned": {"outputs": 2, "depth": 2}}
CASES = [(UNET | options, "class" in name, name) for name, options in UNETS.items()]
CASES += [(DIT | options, True, name) for name, options in DITS.items()]


def random_model(network, classes):
    spec = Spec((8, 8, 4 if network["name"] == "dit" else 3), 5 if classes else 0)
    built = build("networks", network, shape=spec.shape, num_classes=spec.num_classes)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    return built, Model(network, spec, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 4, shapes))


every = pytest.mark.parametrize(
    ("network", "classes"), [case[:2] for case in CASES], ids=[case[2].replace(" ", "_") for case in CASES]
)


@every
def test_written_and_read_back(network, classes, tmp_path):
    _, model = random_model(network, classes)
    models.write(str(tmp_path), model)
    read = models.read(str(tmp_path), null_class=classes and network.get("null_class", True))
    assert read.spec == model.spec
    assert models._whole(read.network) == models._whole(model.network)
    jax.tree.map(np.testing.assert_array_equal, read.params, model.params)


def damaged(folder, tensors=None, config=None):
    """A small model's folder with one of its files changed; returns what reading it says."""
    _, model = random_model(DIT | {"depth": 1}, True)
    models.write(str(folder), model)
    if tensors:
        path = folder / "diffusion_pytorch_model.safetensors"
        safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(path)), path)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(InputError) as raised:
        models.read(str(folder))
    return str(raised.value)


def test_a_tensor_that_does_not_fit_is_named(tmp_path):
    without = damaged(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != "proj_out_1.bias"})
    assert without == "tensors.proj_out_1.bias: [32] is missing"
    extra = damaged(tmp_path, lambda tensors: tensors | {"other.weight": np.zeros((2, 3), np.float32)})
    assert extra == "tensors.other.weight: [2, 3] belongs to no layer of its config.json"
    wrong = damaged(tmp_path, lambda tensors: tensors | {"pos_embed.proj.weight": np.zeros((16, 4, 4, 4), np.float32)})
    assert wrong == "tensors.pos_embed.proj.weight: is [16, 4, 4, 4]; by config.json it must be [16, 4, 2, 2]"


def test_copies_that_differ_are_refused(tmp_path):
    _, model = random_model(DIT, True)
    models.write(str(tmp_path), model)
    path, name = tmp_path / "diffusion_pytorch_model.safetensors", "norm1.emb.timestep_embedder.linear_1.bias"
    read = safetensors.numpy.load_file(path)
    read[f"transformer_blocks.1.{name}"][0] += 1
    safetensors.numpy.save_file(read, path)
    with pytest.raises(InputError, match=f"transformer_blocks.1.{name}: differs from transformer_blocks.0"):
        models.read(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "UNet3DModel"}, "folder: .* holds a UNet3DModel; only"),
        ({"activation_fn": "geglu"}, "config.json.activation_fn: is 'geglu'; only 'gelu-approximate'"),
        ({"out_channels": 5}, "config.json.out_channels: is 5; 4 or 8 can be read"),
        ({"sample_size": [8, 4]}, "config.json.sample_size: is "),
        ({"patch_size": 3}, "config.json.patch: 3 does not divide"),
    ],
)
def test_a_model_that_is_not_ours_is_refused(tmp_path, config, message):
    assert re.match(message, damaged(tmp_path, config=config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"time_embedding_type": "fourier"}, "config.json.time_embedding_type: "),
        ({"class_embed_type": "timestep"}, "config.json.class_embed_type: "),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "config.json.down_block_types: 'SkipDownBlock2D'"),
        ({"up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"]}, "config.json.up_block_types: must mirror"),
        ({"block_out_channels": [16, 24]}, "config.json.block_out_channels: must be multiples"),
        ({"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": None}, "config.json.attn_norm_num_groups"),
    ],
)
def test_a_unet_that_is_not_ours_is_refused(tmp_path, config, message):
    _, model = random_model(UNET | UNETS["ddpm"], False)
    models.write(str(tmp_path), model)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with pytest.raises(InputError, match=message):
        models.read(str(tmp_path))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (UNET | {"rescale": True}, "network.rescale: is True; diffusers' model has False alone"),
        (UNET | {"resample": "projected"}, "network.resample"),
        (UNET | {"groups": None, "channel_mult": (1, 4)}, r"network.groups: are \[4, 8, 16, 32\] in different layers"),
        (DIT | {"positions": "rope"}, "network.positions"),
        (DIT | {"freq_shift": False}, "network.freq_shift"),
        ({"name": "mlp"}, "network.name: 'mlp' has no counterpart"),
    ],
)
def test_what_diffusers_has_not_is_not_written(tmp_path, network, message):
    _, model = random_model(network, True)
    with pytest.raises(InputError, match=message):
        models.write(str(tmp_path / "model"), model)
    assert not (tmp_path / "model").exists()


def test_pickles_and_damage_are_refused(tmp_path):
    models.write(str(tmp_path), random_model(DIT, True)[1])
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"folder: .*safetensors cannot be read"):
        models.read(str(tmp_path))
    weights.unlink()
    with pytest.raises(InputError, match=r"folder: .* holds no diffusion_pytorch_model\.safetensors"):
        models.read(str(tmp_path))
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"folder: .*\.bin is a pickle"):
        models.read(str(tmp_path))


def test_shards_and_half_precision(tmp_path):
    _, model = random_model(DIT, True)
    models.write(str(tmp_path), model)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = {name: value.astype(np.float16) for name, value in safetensors.numpy.load_file(weights).items()}
    weights.unlink()
    shards, names = ("a.safetensors", "b.safetensors"), sorted(tensors)
    for shard, part in zip(shards, (names[::2], names[1::2]), strict=True):
        safetensors.numpy.save_file({name: tensors[name] for name in part}, tmp_path / shard)
    index = {"weight_map": {name: shards[i % 2] for i, name in enumerate(names)}}
    (tmp_path / f"{weights.name}.index.json").write_text(json.dumps(index))
    read = models.read(str(tmp_path)).params
    assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype("float32")}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), read, model.params)


# Against the peer.

peer = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")


def theirs(folder):
    import diffusers

    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder)


@pytest.mark.peers
@peer
@every
def test_outputs_and_gradients_are_the_peers(network, classes, tmp_path):
    """Ours, written; the peer reads it, answers, differentiates, and writes it back."""
    import torch

    built, model = random_model(network, classes)
    models.write(str(tmp_path), model)
    other = theirs(tmp_path).eval()
    rng = np.random.default_rng(1)
    x, g = (rng.normal(size=(3, *model.spec.shape[:2], c * model.spec.shape[2])).astype(np.float32)
            for c in (1, network.get("outputs", 1)))  # fmt: skip
    t, label = np.array([3, 500, 999]), np.array([0, 4, 2])
    args = (torch.tensor(label),) if classes else ()
    answer = other(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), *args).sample
    (answer * torch.tensor(g.transpose(0, 3, 1, 2))).sum().backward()

    def value(params):
        ours = built.apply(params, x, t.astype(np.float32), {"label": label} if classes else {})
        return jnp.sum(ours * g), ours

    (_, ours), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(model.params)
    answer = answer.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours, answer, atol=1e-4 * abs(answer).max())
    wanted = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in other.named_parameters()}
    for pair in models._pairs(model.network, model.spec):
        parts = [wanted[name] for name in pair.theirs]
        if "norm1.emb" in pair.theirs[0]:  # theirs has copies of one of ours, whose gradient is their sum
            parts = [sum(parts)] * len(parts)
        want = pair.join(parts)
        mine = gradient
        for name in pair.ours.split("/"):
            mine = mine[name]
        np.testing.assert_allclose(mine, want, atol=1e-3 * abs(want).max(), err_msg=pair.ours)

    other.save_pretrained(tmp_path / "back")
    read = models.read(str(tmp_path / "back"), null_class=classes and network.get("null_class", True))
    jax.tree.map(np.testing.assert_array_equal, read.params, model.params)
