"""Arrays in a folder: `x.npy`, and `label.npy` where there are classes. `x.npy` is mapped into memory and never read
whole, so it may be larger than that."""

import os
from typing import Any

import numpy as np

from diffusion.core.types import InputError, Spec


class Npy:
    """Examples `[H, W, C]` float32 with `label`, if there are classes.

    Attributes:
      images: `[N, H, W, C]`, as they are on disk.
      labels: `[N]` int32, or None.
    """

    def __init__(self, images: np.memmap, labels: np.ndarray | None, num_classes: int, flip: bool):
        self.images, self.labels, self.flip = images, labels, flip
        low, high = (0.0, 255.0) if images.dtype == np.uint8 else (-1.0, 1.0)
        self.spec = Spec(shape=images.shape[1:], num_classes=num_classes, low=low, high=high)

    def __len__(self) -> int:
        return len(self.images) * (2 if self.flip else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} examples, no number {index}")
        mirrored, index = divmod(index, len(self.images))
        x = np.array(self.images[index], np.float32)
        if self.images.dtype == np.uint8:
            x = x / 127.5 - 1
        if mirrored:
            x = x[:, ::-1]
        return {"x": x, "cond": {} if self.labels is None else {"label": self.labels[index]}}


def make(path: str, num_classes: int = 0, flip: bool = False) -> Npy:
    """Args:
    path: of a folder with `x.npy` `[N, H, W, C]`: images as uint8, which are taken to [-1, 1], or floating-point
      numbers that are used as they are, such as the scaled latents of an autoencoder.
    num_classes: if not 0, `label.npy` `[N]` has integers from 0 to one less than it; if 0, it is not read.
    flip: the set is twice as long: example N + i is example i mirrored left to right. That is right for images. The
      latents of a mirrored image are not the mirrored latents: store them as examples of their own.
    """
    if num_classes < 0:
        raise InputError("num_classes", f"must be at least 0, got {num_classes}")
    images, file = _mapped(path, "x.npy", "the examples [N, H, W, C]")
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise InputError("path", f"{file} holds {images.dtype}; save uint8 (0 to 255), or floating point as it is")
    if images.ndim != 4 or not images.size:
        raise InputError("path", f"{file} has shape {images.shape}; save it as [N, H, W, C], none of them 0")
    if not num_classes:
        return Npy(images, None, 0, flip)
    labels, file = _mapped(path, "label.npy", "the classes [N]")
    if labels.dtype.kind not in "iu":
        raise InputError("path", f"{file} holds {labels.dtype}; save integers")
    if labels.shape != (len(images),):
        raise InputError("path", f"{file} has shape {labels.shape}, but x.npy has {len(images)} examples")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        problem = f"{file} has labels from {low} to {high}; num_classes = {num_classes} wants 0 to {num_classes - 1}"
        raise InputError("path", problem)
    return Npy(images, np.array(labels, np.int32), num_classes, flip)


def _mapped(path: str, name: str, what: str) -> tuple[np.memmap, str]:
    """A file of the folder, and its name for messages."""
    file = os.path.join(path, name)
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise InputError("path", f"there is no {file}; np.save {what} there, or give the folder that has it") from None
    except (OSError, ValueError, EOFError) as error:
        raise InputError("path", f"{file} cannot be read: {error}; np.save {what} there") from None
    if not isinstance(array, np.memmap):
        raise InputError("path", f"{file} is no single array; np.save {what} there")
    return array, file
