"""LPIPS: a closed form, the names of the tensors, and what is refused. With torch installed (`make parity`), values and
gradients agree with a network of torch."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffusion.encoders.vision import lpips
from tests.encoders import vgg
from tests.refusals import refused

distance = jax.jit(lpips.distance)


def images(*shape, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def save(path, *tensors):
    safetensors.numpy.save_file({name: tensor for part in tensors for name, tensor in part.items()}, path)
    return str(path)


def test_closed_form(tmp_path):
    """Where each convolution adds a number to its input, the features can be computed by hand."""
    rng = np.random.default_rng(0)
    tensors, linear = vgg.random_tensors((3,) * 5)
    for name in tensors:
        if name.startswith("features"):
            center = np.zeros((3, 3, 3, 3), np.float32)
            center[range(3), range(3), 1, 1] = 1
            tensors[name] = center if "weight" in name else rng.uniform(-0.3, 0.2, 3).astype(np.float32)
    params = lpips.read([save(tmp_path / "a", tensors, linear)], "field")
    x, y = images(3, 19, 33, 3), images(3, 19, 33, 3, seed=1)

    def features(x):
        x = (x - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
        for stage, numbers in enumerate(((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))):
            if stage:
                x = x[:, : x.shape[1] // 2 * 2, : x.shape[2] // 2 * 2]
                x = np.max([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=0)
            for number in numbers:
                x = np.maximum(x + tensors[f"features.{number}.bias"], 0)
            yield x / (np.linalg.norm(x, axis=-1, keepdims=True) + 1e-10)

    expected = sum(((a - b) ** 2 @ linear[f"lin{stage}.model.1.weight"].ravel()).mean((1, 2))
                   for stage, (a, b) in enumerate(zip(features(x), features(y), strict=True)))  # fmt: skip
    np.testing.assert_allclose(distance(params, x, y), expected, rtol=1e-5)
    np.testing.assert_array_equal(distance(params, x, x), 0)


def test_gray_images_have_three_equal_channels(tmp_path):
    params = lpips.read(vgg.write(tmp_path), "field")
    x, y = images(2, 16, 16, 1), images(2, 16, 16, 1, seed=1)
    expected = distance(params, *(np.repeat(image, 3, axis=-1) for image in (x, y)))
    np.testing.assert_allclose(distance(params, x, y), expected, rtol=1e-5)


def test_the_gradient_is_finite_where_all_channels_are_zero(tmp_path):
    tensors, linear = vgg.random_tensors()
    tensors["features.2.bias"] -= 9
    params = lpips.read([save(tmp_path / "a", tensors, linear)], "field")
    x, y = images(1, 16, 16, 3), images(1, 16, 16, 3, seed=1)
    assert np.isfinite(jax.jit(jax.grad(lambda y: jnp.sum(lpips.distance(params, x, y))))(y)).all()


def test_names(tmp_path):
    """The files of torchvision and LPIPS, the state dict of the package, and a checkpoint that contains it agree."""
    tensors, linear = vgg.random_tensors()
    expected = lpips.read(vgg.write(tmp_path), "field")

    def sliced(name):
        number = int(name.split(".")[1])
        return re.sub("features", f"net.slice{1 + sum(number > last for last in (3, 8, 15, 22))}", name)

    package = {sliced(name): tensor for name, tensor in tensors.items() if "features" in name} | linear
    package |= {f"lins.{name[3]}{name[4:]}": -tensor for name, tensor in linear.items()}
    package["scaling_layer.shift"] = np.zeros((1, 3, 1, 1), np.float32)
    assert "net.slice2.7.weight" in package and "net.slice5.28.bias" in package
    checkpoint = {f"loss.perceptual_loss.{name}": tensor for name, tensor in package.items()}
    for number, contents in enumerate((package, checkpoint)):
        found = lpips.read([save(tmp_path / str(number), contents)], "field")
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_refusals(tmp_path):
    tensors, linear = vgg.random_tensors()
    changes = {"features.28.bias": None, "lin4.model.1.weight": None, "features.5.weight": np.zeros((2, 3, 3, 3)),
               "features.0.weight": np.zeros((2, 3, 5, 5)), "features.7.bias": np.zeros(3),
               "lin2.model.1.weight": np.zeros((1, 2, 1, 1)), "features.2.bias": np.full(2, np.nan)}  # fmt: skip
    for name, value in changes.items():
        changed = {**tensors, **linear, name: None if value is None else value.astype(np.float32)}
        path = save(tmp_path / "a", {name: tensor for name, tensor in changed.items() if tensor is not None})
        with refused("field") as caught:
            lpips.read([path], "field")
        assert name in str(caught.value) and path in str(caught.value)
    for shape in ((15, 16, 3), (16, 15, 3), (16, 16, 2)):
        with refused("field"):
            lpips.check_shape(shape, "field")
    lpips.check_shape((16, 16, 1), "field")


@pytest.mark.peers
@pytest.mark.parametrize("form", ["archive", "pickles"])
def test_parity_with_torch(form, tmp_path):
    import torch
    from torch import nn

    torch.manual_seed(0)
    widths = (8, 12, 16, 20, 24)
    layers, channels = [], 3
    for stage, count in enumerate((2, 2, 3, 3, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, widths[stage], 3, padding=1), nn.ReLU()]
            channels = widths[stage]
        layers.append(nn.MaxPool2d(2))
    model = nn.ModuleDict({"features": nn.Sequential(*layers)})
    with torch.no_grad():
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
    linear = nn.ModuleDict()
    for stage, width in enumerate(widths):
        weights = nn.Conv2d(width, 1, 1, bias=False)
        nn.init.uniform_(weights.weight)
        linear[f"lin{stage}"] = nn.ModuleDict({"model": nn.Sequential(nn.Dropout(), weights)})
    paths = [str(tmp_path / name) for name in ("vgg16.pth", "lpips.pth")]
    for path, part in zip(paths, (model, linear), strict=True):
        torch.save(part.state_dict(), path, _use_new_zipfile_serialization=form == "archive")

    def features(x):
        shift, scale = (torch.tensor(v)[None, :, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
        x = (x - shift) / scale
        for number, layer in enumerate(layers):
            x = layer(x)
            if number in (3, 8, 15, 22, 29):
                yield x / (torch.sqrt((x**2).sum(1, keepdim=True)) + 1e-10)

    x, y = images(2, 32, 48, 3), images(2, 32, 48, 3, seed=1)
    ours, theirs = (torch.from_numpy(image).permute(0, 3, 1, 2) for image in (x, y))
    theirs.requires_grad_()
    expected = sum(linear[f"lin{stage}"].model[1]((a - b) ** 2).mean((1, 2, 3))
                   for stage, (a, b) in enumerate(zip(features(ours), features(theirs), strict=True)))  # fmt: skip
    expected.sum().backward()
    params = lpips.read(paths, "field")
    value, pullback = jax.vjp(lambda y: distance(params, x, y), y)
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-5)
    gradient = theirs.grad.permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(pullback(np.ones(2, np.float32))[0], gradient, atol=1e-5 * np.abs(gradient).max())
