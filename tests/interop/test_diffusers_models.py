"""Model folders of diffusers can be written and read back, and errors name what does not fit. With diffusers installed
(`make parity`), outputs, gradients and weights agree with its models."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffusion.core.build import build
from diffusion.core.types import ArraySpec, Spec, class_labels
from diffusion.interop import diffusers_models as models
from diffusion.interop.diffusers_models import Model
from tests.refusals import refused
from tests.tiers import slow_except

UNET = {"name": "unet", "width": 16, "channel_mult": (1, 2), "num_res_blocks": 1, "attention_resolutions": (4,),
        "head_dim": 8, "groups": 4}  # fmt: skip
DIT = {"name": "dit", "patch_size": 2, "width": 16, "depth": 3, "num_heads": 2, "freq_shift": 1}
UNETS = {
    "ddpm": {"scale_shift": False, "asymmetric_padding": True, "head_dim": None, "freq_shift": 1, "sin_first": True,
             "epsilon": 1e-6},
    "adm": {"resample": "residual", "outputs": 2, "num_res_blocks": 2},
    "classes": {"attention_resolutions": (), "null_class": False},
    "null class": {"attention_resolutions": (8, 4)},
    "no attention": {"attention_resolutions": (), "middle_attention": False, "scale_shift": False},
    "three levels": {"channel_mult": (1, 1, 2), "attention_resolutions": (8, 2), "resample": "residual",
                     "scale_shift": False},
    "widths that are no multiples": {"channel_mult": (1, 1.25, 1.75), "attention_resolutions": (2,), "head_dim": 4},
    "no norm in the middle": {"middle_attention_groups": 0, "outputs": 2},
    "other groups in the middle": {"middle_attention_groups": 8, "scale_shift": False},
    "not square": {"attention_resolutions": (2,)},
    "mixed": {"attention_resolutions": (), "resample": "residual", "asymmetric_padding": False},
}  # fmt: skip
DITS = {
    "S/2": {},
    "an embedder per block": {"block_embedders": True},
    "B/4": {"patch_size": 4, "outputs": 2},
    "learned": {"outputs": 2, "depth": 2},
}
CASES = {name: (UNET | options, "class" in name, (4, 8, 3) if name == "not square" else (8, 8, 3))
         for name, options in UNETS.items()}  # fmt: skip
CASES |= {name: (DIT | options, True, (8, 8, 4)) for name, options in DITS.items()}


def random_model(network, classes, shape=None):
    shape = shape or ((8, 8, 4) if network["name"] == "dit" else (8, 8, 3))
    x = ArraySpec(shape, "latent" if network["name"] == "dit" else "image")
    spec = Spec(x, class_labels(5 if classes else 0))
    built = build("networks", network, shape=spec.shape, num_classes=spec.num_classes)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    return built, Model(network, spec, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) / 4, shapes))


def every(default):
    """Parametrizes a test with all networks, of which those not named in `default` are slow."""
    marked = slow_except([CASES[name] for name in default], CASES.values())
    ids = [name.replace(" ", "_") for name in CASES]
    return pytest.mark.parametrize(("network", "classes", "shape"), marked, ids=ids)


@every(default=("adm", "null class", "widths that are no multiples", "S/2"))
def test_written_and_read_back(network, classes, shape, tmp_path):
    _, model = random_model(network, classes, shape)
    models.write(str(tmp_path), model)
    read = models.read(str(tmp_path), null_class=classes and network.get("null_class", True))
    assert read.spec == model.spec
    assert models.with_defaults(read.network) == models.with_defaults(model.network)
    jax.tree.map(np.testing.assert_array_equal, read.params, model.params)


def read_changed(folder, tensors=None, config=None):
    """Writes a small model's folder, changes one of its files, and reads it."""
    _, model = random_model(DIT | {"depth": 1}, True)
    models.write(str(folder), model)
    if tensors:
        path = folder / "diffusion_pytorch_model.safetensors"
        safetensors.numpy.save_file(tensors(safetensors.numpy.load_file(path)), path)
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    models.read(str(folder))


def test_a_tensor_that_does_not_fit_is_named(tmp_path):
    with refused("tensors.proj_out_1.bias"):
        read_changed(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if k != "proj_out_1.bias"})
    with refused("tensors.other.weight"):
        read_changed(tmp_path, lambda tensors: tensors | {"other.weight": np.zeros((2, 3), np.float32)})
    wrong = {"pos_embed.proj.weight": np.zeros((16, 4, 4, 4), np.float32)}
    with refused("tensors.pos_embed.proj.weight") as caught:
        read_changed(tmp_path, lambda tensors: tensors | wrong)
    assert "[16, 4, 4, 4]" in str(caught.value) and "[16, 4, 2, 2]" in str(caught.value)


def test_a_dit_of_the_class_before_diffusers_0_29(tmp_path):
    _, model = random_model(DIT, True)
    models.write(str(tmp_path), model)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel", "use_linear_projection": False}
    path.write_text(json.dumps(config))
    jax.tree.map(np.testing.assert_array_equal, models.read(str(tmp_path)).params, model.params)
    for change in ({"norm_type": "layer_norm"}, {"cross_attention_dim": 8}, {"interpolation_scale": 2}):
        path.write_text(json.dumps(config | change))
        with refused(f"config.json.{next(iter(change))}"):
            models.read(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"_class_name": "UNet3DModel"}, "folder"),
        ({"activation_fn": "geglu"}, "config.json.activation_fn"),
        ({"out_channels": 5}, "config.json.out_channels"),
        ({"sample_size": [8, 4]}, "config.json.sample_size"),
        ({"patch_size": 3}, "config.json.patch_size"),
        ({"attention_head_dim": 7}, "config.json.attention_head_dim"),
    ],
)
def test_a_model_that_is_not_supported_is_refused(tmp_path, config, field):
    with refused(field):
        read_changed(tmp_path, config=config)


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"time_embedding_type": "fourier"}, "time_embedding_type"),
        ({"class_embed_type": "timestep"}, "class_embed_type"),
        ({"freq_shift": 2}, "freq_shift"),
        ({"down_block_types": ["SkipDownBlock2D", "DownBlock2D"]}, "down_block_types"),
        ({"up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D"]}, "up_block_types"),
        ({"block_out_channels": [16, 30]}, "norm_num_groups"),
        ({"attention_head_dim": 7}, "attention_head_dim"),
        ({"attn_norm_num_groups": 5}, "attn_norm_num_groups"),
        ({"sample_size": None}, "sample_size"),
        ({"sample_size": [8, 7]}, "sample_size"),
        ({"mid_block_type": None}, "mid_block_type"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor"),
        ({"time_embedding_dim": 32}, "time_embedding_dim"),
        ({"center_input_sample": True}, "center_input_sample"),
    ],
)
def test_a_unet_that_is_not_supported_is_refused(tmp_path, config, field):
    _, model = random_model(UNET | UNETS["ddpm"], False)
    models.write(str(tmp_path), model)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with refused(f"config.json.{field}"):
        models.read(str(tmp_path))


@pytest.mark.parametrize(
    ("network", "field"),
    [
        (UNET | {"rescale": True}, "rescale"),
        (UNET | {"resample": "projected"}, "resample"),
        (UNET | {"groups": None, "channel_mult": (1, 4)}, "groups"),
        (UNET | {"channel_mult": (2, 4)}, "channel_mult"),
        (UNET | {"middle_attention_groups": 0, "scale_shift": False}, "middle_attention_groups"),
        (DIT | {"positions": "rope"}, "positions"),
        (DIT | {"freq_shift": 0}, "freq_shift"),
        ({"name": "mlp"}, "name"),
    ],
)
def test_options_that_diffusers_lacks_are_refused(tmp_path, network, field):
    _, model = random_model(network, True)
    with refused(f"network.{field}"):
        models.write(str(tmp_path / "model"), model)
    assert not (tmp_path / "model").exists()


def test_pickles_and_corrupt_files_are_refused(tmp_path):
    models.write(str(tmp_path), random_model(DIT, True)[1])
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with refused("folder") as caught:
        models.read(str(tmp_path))
    assert str(weights) in str(caught.value)
    weights.unlink()
    with refused("folder") as caught:
        models.read(str(tmp_path))
    assert weights.name in str(caught.value) and "is a pickle" not in str(caught.value)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"")
    with refused("folder") as caught:
        models.read(str(tmp_path))
    assert "is a pickle" in str(caught.value)


def write_shards(folder, tensors, variant=""):
    dot = variant and f".{variant}"
    shards, names = [f"diffusion_pytorch_model{dot}-0000{i}-of-00002.safetensors" for i in (1, 2)], sorted(tensors)
    for shard, part in zip(shards, (names[::2], names[1::2]), strict=True):
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / shard)
    index = {"weight_map": {name: shards[i % 2] for i, name in enumerate(names)}}
    (folder / f"diffusion_pytorch_model.safetensors.index{dot}.json").write_text(json.dumps(index))


def test_shards_and_variants(tmp_path):
    """Without --variant the plain weights are read, or the only ones, and half precision becomes float32."""
    _, model = random_model(DIT, True)
    models.write(str(tmp_path), model)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    write_shards(tmp_path, {name: value.astype(np.float16) for name, value in tensors.items()}, "fp16")
    safetensors.numpy.save_file(
        {name: value + 1 for name, value in tensors.items()}, tmp_path / "diffusion_pytorch_model.ema.safetensors"
    )

    def difference(**options):
        read = models.read(str(tmp_path), **options).params
        assert {leaf.dtype for leaf in jax.tree.leaves(read)} == {np.dtype("float32")}
        both = zip(jax.tree.leaves(read), jax.tree.leaves(model.params), strict=True)
        return max(abs(a - b).max() for a, b in both)

    assert difference() == 0 and 0 < difference(variant="fp16") < 1e-3 and 0.9 < difference(variant="ema") < 1.1
    with refused("folder") as caught:
        models.read(str(tmp_path), variant="bf16")
    assert "ema, fp16" in str(caught.value)
    weights.unlink()
    with refused("folder") as caught:
        models.read(str(tmp_path))
    assert "several variants" in str(caught.value)
    (tmp_path / "diffusion_pytorch_model.ema.safetensors").unlink()
    assert 0 < difference() < 1e-3
    (tmp_path / "diffusion_pytorch_model.safetensors.index.fp16.json").unlink()
    with refused("folder") as caught:
        models.read(str(tmp_path))
    assert "no index" in str(caught.value)
    write_shards(tmp_path, tensors)
    assert difference() == 0


def test_weights_that_are_not_there_or_not_finite(tmp_path):
    _, model = random_model(DIT, True)
    models.write(str(tmp_path), model)
    weights = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.numpy.load_file(weights)
    tensors["proj_out_1.bias"][3] = np.nan
    safetensors.numpy.save_file(tensors, weights)
    with refused("tensors.proj_out_1.bias") as caught:
        models.read(str(tmp_path))
    assert "1 of 32 values" in str(caught.value)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with refused("folder") as caught:
        models.read(str(tmp_path))
    assert "Git LFS" in str(caught.value)


# A small model with weights in closed form, whose output diffusers computed.

RECORDED = UNET | {"channel_mult": (1, 1.25), "middle_attention_groups": 0, "attention_resolutions": (), "head_dim": 4,
                   "outputs": 2}  # fmt: skip
RECORDED_OUTPUT = (-0.566943, -0.350592, -0.093511, -0.197483)  # of diffusers 0.42.1 at [0, 1, ::2, 1]


def recorded_model():
    built, model = random_model(RECORDED, False, (4, 8, 1))
    rng = np.random.RandomState(0)  # its stream never changes
    params = jax.tree.map(lambda a: (rng.uniform(-1, 1, a.shape) / 3).astype(np.float32), model.params)
    return built, Model(model.network, model.spec, params), np.cos(np.arange(32, dtype=np.float32)).reshape(1, 4, 8, 1)


def test_the_output_is_the_one_recorded():
    built, model, x = recorded_model()
    out = jax.jit(built.apply)(model.params, x, np.float32([321]), {})
    np.testing.assert_allclose(out[0, 1, ::2, 1], RECORDED_OUTPUT, atol=1e-4)


# Comparison with diffusers.

peer = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")


def load_foreign(folder):
    import diffusers

    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    return getattr(diffusers, kind).from_pretrained(folder)


@pytest.mark.peers
@peer
def test_the_recorded_output_is_that_of_diffusers(tmp_path):
    import torch

    _, model, x = recorded_model()
    models.write(str(tmp_path), model)
    out = load_foreign(tmp_path).eval()(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor([321])).sample
    np.testing.assert_allclose(out.detach().numpy()[0, 1, 1, ::2], RECORDED_OUTPUT, atol=1e-5)


@pytest.mark.peers
@peer
@every(default=())
def test_outputs_and_gradients_agree(network, classes, shape, tmp_path):
    """diffusers loads a model that was written, gives the same output and gradients, and saves the same weights."""
    import torch

    built, model = random_model(network, classes, shape)
    models.write(str(tmp_path), model)
    other = load_foreign(tmp_path).eval()
    rng = np.random.default_rng(1)
    x, g = (rng.normal(size=(3, *model.spec.shape[:2], c * model.spec.shape[2])).astype(np.float32)
            for c in (1, network.get("outputs", 1)))  # fmt: skip
    t, label = np.array([3, 500, 999]), np.array([0, 4, 2])
    args = (torch.tensor(label),) if classes else ()
    expected = other(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), *args).sample
    (expected * torch.tensor(g.transpose(0, 3, 1, 2))).sum().backward()

    def value(params):
        out = built.apply(params, x, t.astype(np.float32), {"label": label} if classes else {})
        return jnp.sum(out * g), out

    (_, out), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(model.params)
    expected = expected.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(out, expected, atol=1e-4 * abs(expected).max())
    gradients = {name: np.zeros(p.shape) if p.grad is None else p.grad.numpy() for name, p in other.named_parameters()}
    for pair in models.pairs(model.network, model.spec):
        parts = [gradients[name] for name in pair.foreign]
        is_copied = "norm1.emb" in pair.foreign[0] and not network.get("block_embedders")
        if is_copied:  # the gradients of copies of one array add up
            parts = [sum(parts)] * len(parts)
        expected = pair.join(parts)
        actual = gradient
        for name in pair.native.split("/"):
            actual = actual[name]
        np.testing.assert_allclose(actual, expected, atol=1e-3 * abs(expected).max(), err_msg=pair.native)

    other.save_pretrained(tmp_path / "back")
    read = models.read(str(tmp_path / "back"), null_class=classes and network.get("null_class", True))
    jax.tree.map(np.testing.assert_array_equal, read.params, model.params)
