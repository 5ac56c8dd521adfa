"""A linear autoencoder of image patches by principal components.

    z = B^T (patch - mean) / std        patch = mean + B (std z)

Each patch of `p x p` pixels becomes one latent pixel with a channel per component, of mean 0 and variance 1 on the data
that it was fitted to. `python -m experiments.fit_pca` fits it and writes the file.
"""

import json
import os

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from diffusion.core import checks, files
from diffusion.core.types import Array, Autoencoder, InputError, Params

NAMES = ("mean", "basis", "std")


def fit(images: np.ndarray, patch_size: int, channels: int) -> tuple[dict[str, np.ndarray], float]:
    """Fits the components, in float64.

    Args:
      images: `[N, H, W, C]` in [-1, 1].
      patch_size: The side p of a patch in pixels.
      channels: The number of components, at most p * p * C and the number of patches.

    Returns:
      The parameters `mean [D]`, `basis [D, channels]` and `std [channels]`, float32, where D = p * p * C, and the share
      of the variance that the components have.

    Raises:
      InputError: A number is out of range, or a component does not vary.
    """
    checks.at_least(1, patch_size=patch_size, channels=channels)
    _, height, width, depth = images.shape
    if height % patch_size or width % patch_size:
        raise InputError("patch_size", f"must divide the {height} x {width} pixels of an image, got {patch_size}")
    size = patch_size**2 * depth
    checks.at_most(size, channels, "channels")
    patches = np.asarray(_patches(images, patch_size), np.float64).reshape(-1, size)
    mean = patches.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(patches - mean, rowvar=False).reshape(size, size))
    values, vectors = values[::-1], vectors[:, ::-1]  # the largest first
    if values[channels - 1] <= 1e-9 * values[0]:
        varying = int((values > 1e-9 * values[0]).sum())
        raise InputError("channels", f"must be at most {varying}, the number of components that vary, got {channels}")
    # The sign of a component is arbitrary; make the largest weight positive, on every machine.
    signs = np.sign(np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0))
    params = {"mean": mean, "basis": (vectors * signs)[:, :channels], "std": np.sqrt(values[:channels])}
    share = float(values[:channels].sum() / values.sum())
    return {name: value.astype(np.float32) for name, value in params.items()}, share


def save(path: str, params: dict[str, np.ndarray], shape: tuple[int, ...], patch_size: int) -> None:
    """Writes the file that `make` reads.

    Args:
      path: The file, `.safetensors`.
      params: From `fit`.
      shape: The shape of one image.
      patch_size: The side of a patch.
    """
    about = {"shape": json.dumps(shape), "patch_size": str(patch_size)}
    with files.replace(path, "wb") as file:
        file.write(safetensors.numpy.save({name: np.ascontiguousarray(params[name]) for name in NAMES}, about))


def make(shape: tuple[int, ...], path: str) -> Autoencoder:
    """Reads a fitted autoencoder.

    Args:
      shape: `(H, W, C)`; given by the data.
      path: The file that `experiments.fit_pca` has written.

    Raises:
      InputError: The file cannot be read, or was fitted to images of another shape.
    """
    params, about = _read(path)
    fitted, side = tuple(json.loads(about["shape"])), int(about["patch_size"])
    if fitted[-1] != shape[-1] or len(shape) != 3 or any(size % side for size in shape[:2]):
        problem = f"was fitted to patches of {side} x {side} pixels of images {fitted}, which the data {shape} lack"
        raise InputError("path", f"{path} {problem}; fit one to these data")
    latent_shape = (shape[0] // side, shape[1] // side, params["std"].size)

    def encode(params: Params, x: Array) -> Array:
        return (_patches(x, side) - params["mean"]) @ params["basis"] / params["std"]

    def decode(params: Params, z: Array) -> Array:
        patches = z * params["std"] @ params["basis"].T + params["mean"]
        _, rows, columns, _ = z.shape
        x = patches.reshape(-1, rows, columns, side, side, shape[2]).swapaxes(2, 3)
        return x.reshape(-1, rows * side, columns * side, shape[2])

    return Autoencoder({name: jnp.asarray(value) for name, value in params.items()}, encode, decode,
                       latent_shape, files.sha256(path))  # fmt: skip


def _patches(x: Array, side: int) -> Array:
    """Returns `[B, H / side, W / side, side * side * C]`."""
    batch, height, width, depth = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, depth).swapaxes(2, 3)
    return x.reshape(batch, height // side, width // side, side * side * depth)


def _read(path: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    if not os.path.isfile(path):
        raise InputError("path", f"there is no {path}; fit one: python -m experiments.fit_pca --out={path}")
    try:
        with safetensors.safe_open(path, "numpy") as file:
            about, params = file.metadata() or {}, {name: file.get_tensor(name) for name in NAMES}
    except (OSError, safetensors.SafetensorError) as error:
        raise InputError("path", f"{path} cannot be read: {error}") from None
    sizes = params["mean"].size, params["std"].size
    if not {"shape", "patch_size"} <= about.keys() or params["basis"].shape != sizes:
        raise InputError("path", f"{path} is not a file of experiments.fit_pca")
    return params, about
