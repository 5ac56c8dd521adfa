"""Arrays in a folder: `x.npy`, and `label.npy` if there are classes.

`x.npy` is memory-mapped, so it may be larger than the memory.
"""

import os
from typing import Any

import numpy as np

from diffusion.core import checks
from diffusion.core.types import ArraySpec, InputError, Spec, class_labels

LOCATION_KEYWORDS = ("path",)  # see pipeline.location_keywords


class Npy:
    """Examples `[H, W, C]`, uint8 or float32, with `label` if there are classes.

    Attributes:
      images: `[N, H, W, C]`, with the dtype of the file.
      labels: `[N]` int32, or None.
    """

    def __init__(self, images: np.memmap, labels: np.ndarray | None, num_classes: int, flip: bool):
        self.images, self.labels, self.flip = images, labels, flip
        options = {"dtype": "uint8"} if images.dtype == np.uint8 else {"kind": "latent", "low": -1.0, "high": 1.0}
        self.spec = Spec(ArraySpec(images.shape[1:], **options), class_labels(num_classes))

    def __len__(self) -> int:
        return len(self.images) * (2 if self.flip else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        mirrored, index = divmod(index, len(self.images))
        x = np.array(self.images[index], self.spec.x.dtype)
        if mirrored:
            x = x[:, ::-1]
        return {"x": x, "cond": {} if self.labels is None else {"label": self.labels[index]}}


def make(path: str, num_classes: int = 0, flip: bool = False) -> Npy:
    """Opens arrays in a folder.

    Args:
      path: Folder with `x.npy` `[N, H, W, C]`: either uint8 images, which stand for [-1, 1], or floating-point
        numbers, which are used unchanged, such as the scaled latents of an autoencoder.
      num_classes: Number of classes. With 0, `label.npy` is not read; otherwise it must hold integers `[N]` from 0 to
        `num_classes - 1`.
      flip: Whether to add mirror images, which doubles the number of examples: example N + i is example i mirrored left
        to right. Use this for images only. The latents of a mirrored image are not the mirrored latents; store them as
        separate examples.
    """
    checks.at_least(0, num_classes=num_classes)
    images, file = _mapped(path, "x.npy", "the examples [N, H, W, C]")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise InputError("path", f"{file} must be uint8 (0 to 255) or floating-point, got {images.dtype}")
    if images.ndim != 4 or not images.size:
        raise InputError("path", f"{file} must have shape [N, H, W, C] and not be empty, got {images.shape}")
    if not num_classes:
        return Npy(images, None, 0, flip)
    labels, file = _mapped(path, "label.npy", "the classes [N]")
    if labels.dtype.kind not in "iu":
        raise InputError("path", f"{file} must hold integers, got {labels.dtype}")
    if labels.shape != (len(images),):
        raise InputError("path", f"{file} must have shape ({len(images)},) to match x.npy, got {labels.shape}")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        problem = f"must hold labels from 0 to {num_classes - 1}, as num_classes = {num_classes}"
        raise InputError("path", f"{file} {problem}, got {low} to {high}")
    return Npy(images, np.array(labels, np.int32), num_classes, flip)


def _mapped(path: str, name: str, what: str) -> tuple[np.memmap, str]:
    """Memory-maps a file of the folder. Returns the array and the path of the file."""
    file = os.path.join(path, name)
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        problem = f"there is no {file}; write {what} there with np.save, or give another folder"
        raise InputError("path", problem) from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError("path", f"{file} cannot be read: {error}; write {what} there with np.save") from None
    if not isinstance(array, np.memmap):
        raise InputError("path", f"{file} is not a single array; write {what} there with np.save")
    return array, file
