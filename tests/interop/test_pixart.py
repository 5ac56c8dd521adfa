"""Folders of PixArt's transformer can be written and read back, and errors name what does not fit. With diffusers
installed (`make parity`), outputs, gradients and weights agree with its model."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.core.build import build_network
from diffusion.core.types import ArraySpec, ConditionSpec, Spec, Text
from diffusion.interop import diffusers_models as models
from diffusion.interop import diffusers_pipeline
from diffusion.interop.diffusers_models import Model
from tests.refusals import refused

LENGTH, FEATURES = 5, 12  # of a text
SIZES = {"resolution": ConditionSpec("vector", (2,)), "aspect_ratio": ConditionSpec("scalar")}
PIXART = {"name": "dit", "patch_size": 2, "width": 24, "depth": 2, "num_heads": 3, "modulation": "single",
          "text_projection": "mlp", "null_text": False, "interpolation_scale": 1, "outputs": 2}  # fmt: skip
CASES = {  # options, and the height and width of x
    "alpha": ({}, (8, 8)),
    "sizes": ({"size_embedding": True, "interpolation_scale": 2, "depth": 3}, (8, 8)),
    "not square": ({"interpolation_scale": 0.5, "outputs": 1, "num_heads": 2}, (4, 12)),
}


def random_model(network=PIXART, side=8, conditions=None):
    """Returns a built network, and its parameters in closed form, of which none is zero."""
    text = {"text": ConditionSpec("text", (LENGTH, FEATURES)), **(SIZES if network.get("size_embedding") else {})}
    spec = Spec(ArraySpec((side, side, 4), "latent"), text if conditions is None else conditions)
    built = build_network(network, spec)
    rng = np.random.RandomState(0)  # its stream never changes
    shapes = jax.eval_shape(built.init, jax.random.key(0))
    params = jax.tree.map(lambda leaf: (rng.uniform(-1, 1, leaf.shape) / 3).astype(np.float32), shapes)
    return built, Model(network, spec, params)


def inputs(network, height, width):
    """Returns x, c_noise and cond of three examples, the texts of which have 5, 3 and 1 tokens."""
    rng = np.random.RandomState(1)
    x = rng.uniform(-1, 1, (3, height, width, 4)).astype(np.float32)
    mask = np.arange(LENGTH) < np.array([[5], [3], [1]])
    cond = {"text": Text(rng.uniform(-2, 2, (3, LENGTH, FEATURES)).astype(np.float32), mask)}
    if network.get("size_embedding"):
        resolution = np.float32([[1024, 512], [640, 960], [768, 768]])
        cond |= {"resolution": resolution, "aspect_ratio": resolution[:, 0] / resolution[:, 1]}
    return x, np.float32([3, 500, 999]), cond


@pytest.mark.parametrize(("options", "size"), CASES.values(), ids=CASES)
def test_written_and_read_back(options, size, tmp_path):
    _, model = random_model(PIXART | options)
    models.write(str(tmp_path), model)
    read = models.read(str(tmp_path), text_length=LENGTH)
    assert read.spec == model.spec
    assert models.with_defaults(read.network) == models.with_defaults(model.network)
    jax.tree.map(np.testing.assert_array_equal, read.params, model.params)
    assert models.read(str(tmp_path)).spec.conditions["text"].shape == (120, FEATURES)


def test_the_class_before_diffusers_0_29(tmp_path):
    _, model = random_model()
    models.write(str(tmp_path), model)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | {"_class_name": "Transformer2DModel", "interpolation_scale": None}
    path.write_text(json.dumps(config | {"use_linear_projection": False, "num_vector_embeds": None}))
    read = models.read(str(tmp_path), text_length=LENGTH)
    assert models.with_defaults(read.network) == models.with_defaults(model.network)
    jax.tree.map(np.testing.assert_array_equal, read.params, model.params)
    path.write_text(json.dumps({name: value for name, value in config.items() if name != "attention_bias"}))
    with refused("config.json.attention_bias"):  # its default is another in this class
        models.read(str(tmp_path))


def test_a_run_without_a_scheduler_is_written_as_a_model(tmp_path):
    _, model = random_model()
    objective = {"name": "flow_matching", "schedule": "flow", "parameterization": "v"}
    assert "no pipeline" in diffusers_pipeline.write(str(tmp_path), model, {"objective": objective})
    assert models.read(str(tmp_path)).spec.conditions["text"].shape == (120, FEATURES)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"caption_channels": None}, "caption_channels"),
        ({"cross_attention_dim": 16}, "cross_attention_dim"),
        ({"norm_eps": 1e-5}, "norm_eps"),
        ({"attention_type": "gated"}, "attention_type"),
        ({"attention_bias": False}, "attention_bias"),
        ({"norm_type": "ada_norm_zero"}, "norm_type"),
        ({"sample_size": [8, 4]}, "sample_size"),
        ({"interpolation_scale": -1}, "interpolation_scale"),
        ({"use_additional_conditions": True, "num_attention_heads": 2}, "attention_head_dim"),
    ],
)
def test_a_model_that_is_not_supported_is_refused(tmp_path, change, field):
    models.write(str(tmp_path), random_model()[1])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text()) | change
    if "num_attention_heads" in change:
        config["cross_attention_dim"] = 16
    path.write_text(json.dumps(config))
    with refused(f"config.json.{field}"):
        models.read(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"modulation": "block"}, "network.modulation"),
        ({"text": "joint"}, "network.text"),
        ({"text_projection": "linear"}, "network.text_projection"),
        ({"null_text": True}, "network.null_text"),
        ({"freq_shift": 1}, "network.freq_shift"),
        ({"scalar_conditions": ("step_size",)}, "network.scalar_conditions"),
        ({"self_conditioning": True}, "network.self_conditioning"),
    ],
)
def test_options_that_diffusers_lacks_are_refused(tmp_path, options, field):
    with refused(field):
        models.write(str(tmp_path / "model"), random_model(PIXART | options)[1])
    assert not (tmp_path / "model").exists()


def test_data_that_diffusers_lacks_are_refused(tmp_path):
    _, model = random_model()
    text = {"text": ConditionSpec("text", (LENGTH, FEATURES))}
    for conditions in (
        text | {"pose": ConditionSpec("vector", (2,))},
        {"text": ConditionSpec("text", (3, 4), pooled=2)},
    ):
        spec = dataclasses.replace(model.spec, conditions=conditions)
        with refused("data"):
            models.write(str(tmp_path / "model"), dataclasses.replace(model, spec=spec))
    spec = dataclasses.replace(model.spec, x=ArraySpec((8, 4, 4), "latent"))
    with refused("spec.shape"):
        models.write(str(tmp_path / "model"), dataclasses.replace(model, spec=spec))


PUBLISHED = {  # the config that differs from the class defaults, and the number of parameters
    "alpha 512": ({"sample_size": 64, "interpolation_scale": 1, "caption_channels": 4096}, 610_856_096),
    "alpha 1024": ({"sample_size": 128, "caption_channels": 4096}, 611_349_152),
    "sigma 1024": ({"sample_size": 128, "interpolation_scale": 2, "use_additional_conditions": False,
                    "caption_channels": 4096}, 610_856_096),
}  # fmt: skip


def published_shapes(config):
    """Returns the names and shapes of the tensors that a folder with this config must have."""
    converter = models.diffusers_pixart
    network, spec = converter.network_of({"_class_name": "PixArtTransformer2DModel", **config}, {}, False)
    shapes = jax.eval_shape(build_network(network, spec).init, jax.random.key(0))
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)  # takes no memory
    flat = models.tensors.trees.by_path(zeros)
    return {name: part.shape for pair in models.pairs(network, spec)
            for name, part in zip(pair.foreign, pair.split(flat[pair.native]), strict=True)}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_parameter_counts(name):
    config, count = PUBLISHED[name]
    shapes = published_shapes(config)
    assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) == count


RECORDED_OUTPUT = (0.274077, 0.352777, 0.344239, 0.400901)  # of diffusers 0.42.1 at [1, 2, ::2, 1]


def test_the_output_is_the_one_recorded():
    network = PIXART | CASES["sizes"][0]
    built, model = random_model(network)
    out = jax.jit(built.apply)(model.params, *inputs(network, 8, 8))
    np.testing.assert_allclose(out[1, 2, ::2, 1], RECORDED_OUTPUT, atol=3e-5)  # two kinds of GELU differ by more


# Comparison with diffusers.

peer = pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed")


def foreign_output(model, x, c_noise, cond):
    """Calls diffusers' model and returns its output, a tensor `[B, C, H, W]`."""
    import torch

    more = {name: torch.tensor(cond[name]) for name in SIZES if name in cond}
    return model(
        torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(cond["text"].tokens), timestep=torch.tensor(c_noise),
        encoder_attention_mask=torch.tensor(cond["text"].mask).float(), added_cond_kwargs=more or None,
    ).sample  # fmt: skip


@pytest.mark.peers
@peer
@pytest.mark.parametrize(("options", "size"), CASES.values(), ids=CASES)
def test_outputs_and_gradients_agree(options, size, tmp_path):
    """diffusers loads a model that was written, gives the same output and gradients, and saves the same weights."""
    import diffusers
    import torch

    network = PIXART | options
    built, model = random_model(network)
    models.write(str(tmp_path), model)
    other = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path).eval()
    args = inputs(network, *size)
    expected = foreign_output(other, *args)
    if options == CASES["sizes"][0]:
        np.testing.assert_allclose(expected.detach().numpy()[1, 1, 2, ::2], RECORDED_OUTPUT, atol=1e-5)
    g = np.random.default_rng(2).normal(size=expected.shape).astype(np.float32)
    (expected * torch.tensor(g)).sum().backward()

    def value(params):
        out = built.apply(params, *args)
        return jnp.sum(out * g.transpose(0, 2, 3, 1)), out

    (_, out), gradient = jax.jit(jax.value_and_grad(value, has_aux=True))(model.params)
    expected = expected.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(out, expected, atol=1e-4 * abs(expected).max())
    flat = models.tensors.trees.by_path(gradient)
    gradients = {name: p.grad.numpy() for name, p in other.named_parameters()}
    for pair in models.pairs(model.network, model.spec):
        expected = pair.join([gradients[name] for name in pair.foreign])
        np.testing.assert_allclose(flat[pair.native], expected, atol=1e-3 * abs(expected).max(), err_msg=pair.native)

    other.save_pretrained(tmp_path / "back")
    read = models.read(str(tmp_path / "back"), text_length=LENGTH)
    jax.tree.map(np.testing.assert_array_equal, read.params, model.params)


@pytest.mark.peers
@peer
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_shapes_are_those_of_diffusers(name):
    import diffusers
    import torch

    config, count = PUBLISHED[name]
    with torch.device("meta"):
        other = diffusers.PixArtTransformer2DModel(**config)
    assert sum(p.numel() for p in other.parameters()) == count
    assert published_shapes(config) == {name: tuple(tensor.shape) for name, tensor in other.state_dict().items()}
