"""The perceptual distance LPIPS on VGG16 (Zhang et al. 2018, arXiv 1801.03924).

    d(x, y) = sum over stages l of the mean over pixels of sum over channels c of w_lc (f_lc(x) - f_lc(y))^2

f_l is the last activation of stage l of VGG16 (relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3), divided by its norm
over the channels at each pixel, and w_l are weights that were fitted to judgements of people.
"""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from diffusion.core import tensor_file
from diffusion.core.types import Array, InputError, Params

# Of ImageNet's channels on [-1, 1], rounded as in the published code.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
# The convolutions of each stage by their numbers among torchvision's `features`.
STAGES = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))
SMALLEST_SIDE = 2 ** (len(STAGES) - 1)
EPSILON = 1e-10
# torchvision has `features.5.weight`, and the package lpips `net.slice2.5.weight`; checkpoints add prefixes.
_NAMES = ((r"(?:^|\.)(?:features|net\.slice\d)\.(\d+\.(?:weight|bias))$", r"features.\1"),
          (r"(?:^|\.)(lin\d\.model\.1\.weight)$", r"\1"))  # fmt: skip


def read(paths: Sequence[str], field: str) -> Params:
    """Reads the parameters, float32.

    Args:
      paths: Files that `tensor_file.read` accepts. Together they have the convolutions of VGG16, with the names of
        torchvision or of the package lpips, and the weights `lin0.model.1.weight` to `lin4.model.1.weight`; other
        tensors are ignored. The numbers of channels are those of the tensors.
      field: Named by errors.

    Raises:
      InputError: A file cannot be read, or a tensor is missing, of the wrong shape or not finite.
    """
    found = {}
    for path in paths:
        for name, tensor in tensor_file.read(path, field).items():
            for pattern, ours in _NAMES:
                if match := re.search(pattern, name):
                    found[match.expand(ours)] = tensor

    def take(name: str, *shape: int | None) -> np.ndarray:
        if name not in found:
            problem = f"{', '.join(paths)}: {name} is missing; give the files of torchvision's VGG16 and of LPIPS"
            raise InputError(field, problem)
        actual = found[name].shape
        if len(actual) != len(shape) or any(size not in (None, n) for n, size in zip(actual, shape, strict=True)):
            expected = ["any" if size is None else size for size in shape]
            problem = f"{name} must have shape {expected}, got {list(actual)}".replace("'", "")
            raise InputError(field, f"{', '.join(paths)}: {problem}")
        try:
            return tensor_file.to_float32({name: found[name]})[name]
        except InputError as error:
            raise InputError(field, f"{', '.join(paths)}: {error}") from None

    params, width = {}, len(SHIFT)
    for stage, numbers in enumerate(STAGES):
        for number in numbers:
            kernel = take(f"features.{number}.weight", None, width, 3, 3)
            width = len(kernel)
            bias = take(f"features.{number}.bias", width)
            params[f"conv_{number}"] = {"kernel": kernel.transpose(2, 3, 1, 0), "bias": bias}
        params[f"lin_{stage}"] = {"kernel": take(f"lin{stage}.model.1.weight", 1, width, 1, 1).reshape(width)}
    return params


def check_shape(shape: tuple[int, ...], field: str) -> None:
    """Raises InputError, naming `field`, if images `[H, W, C]` of a shape have no distance."""
    if shape[-1] not in (1, len(SHIFT)) or min(shape[:2]) < SMALLEST_SIDE:
        problem = f"LPIPS requires images of one or three channels and of at least {SMALLEST_SIDE} pixels per side"
        raise InputError(field, f"{problem}, got {shape}")


def distance(params: Params, x: Array, y: Array) -> Array:
    """Returns d(x, y), `[B]`, of images `[B, H, W, C]` in [-1, 1]; one channel counts as three equal ones."""
    total = jnp.zeros(len(x), x.dtype)
    for stage, pair in enumerate(zip(_features(params, x), _features(params, y.astype(x.dtype)), strict=True)):
        apart = params[f"lin_{stage}"]["kernel"].astype(x.dtype) * jnp.square(pair[0] - pair[1])
        total += jnp.mean(jnp.sum(apart, axis=-1), axis=(1, 2))
    return total


def _features(params: Params, x: Array) -> list[Array]:
    """Returns the features of each stage, `[B, h, w, c]`, of norm 1 over the channels."""
    x = (x - jnp.array(SHIFT, x.dtype)) / jnp.array(SCALE, x.dtype)  # also repeats the channel of gray images
    found = []
    for stage, numbers in enumerate(STAGES):
        if stage:
            x = nnx.max_pool(x, (2, 2), (2, 2))
        for number in numbers:
            kernel, bias = (params[f"conv_{number}"][name].astype(x.dtype) for name in ("kernel", "bias"))
            dimensions = ("NHWC", "HWIO", "NHWC")
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=dimensions) + bias
            )
        # The derivative of the root is not finite where all channels are 0; there, relu does not pass it on.
        norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
        found.append(x / (norm + EPSILON))
    return found
