"""Images in a directory tree, with the top-level directories as classes and captions from text files."""

import logging
import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image

from diffusion.core.types import ArraySpec, InputError, Spec, class_labels
from diffusion.data import image_ops
from diffusion.data.file_index import FileIndex

LOCATION_KEYWORDS = ("path", "index", "on_error")  # see pipeline.location_keywords

Size = tuple[int, int]

logger = logging.getLogger(__name__)


class Folder:
    """Examples `[H, W, C]` uint8, with `label` and `caption` if requested.

    Attributes:
      index: The index of the files.
      shapes: The sizes of the examples. If there are several, the source has `buckets`.
      buckets: `[N]` int32, the index in `shapes` of each image's size, the one with the nearest aspect ratio.
    """

    def __init__(
        self, index: FileIndex, transform: image_ops.Transform, shapes: tuple[Size, ...], labels: bool, captions: bool,
        skip: bool,
    ):  # fmt: skip
        self.index, self.transform, self.shapes, self.skip = index, transform, shapes, skip
        self.labels, self.captions = labels, captions
        self.class_names = index.class_names if labels else ()
        if len(shapes) > 1:
            self.buckets = _nearest(index.sizes(), shapes)
        height, width = shapes[0]
        shape = (height, width, transform.channels)
        self.spec = Spec(ArraySpec(shape, dtype="uint8"), class_labels(len(self.class_names)), captions)
        self._reported = set()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} examples")
        return self._readable(index, None)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns the example with its random crop and flip."""
        return self._readable(index, rng)

    @property
    def stages(self) -> tuple[tuple[str, Callable], ...]:
        """The functions, with their names, whose composition is `self[index]`."""
        return (
            ("read", lambda index: (index, self._bytes(index))),
            ("decode", lambda read: (read[0], image_ops.decode(read[1]))),
            ("transform", lambda decoded: self._example(*decoded, None)),
        )

    def _readable(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """Returns the example or, with `skip`, the next one of its bucket that can be read."""
        number = index
        for _ in range(len(self)):
            try:
                example = self._example(number, image_ops.decode(self._bytes(number)), rng)
                return {**example, "skipped": np.bool_(number != index)} if self.skip else example
            except image_ops.Unreadable as error:
                problem = f"{self.index.path(number)} {error}"
            if not self.skip:
                raise InputError("data", f"{problem}; fix or remove it, or set data.on_error='skip'")
            if number not in self._reported:
                self._reported.add(number)
                logger.warning("skipped: %s", problem)
            number = self._next(number)
        raise InputError("data.path", f"no image in {self.index.root} can be read")

    def _next(self, index: int) -> int:
        after = (index + 1) % len(self)
        if len(self.shapes) > 1:
            while self.buckets[after] != self.buckets[index]:
                after = (after + 1) % len(self)
        return after

    def _bytes(self, index: int) -> bytes:
        try:
            with open(self.index.path(index), "rb") as file:
                return file.read()
        except OSError as error:
            raise image_ops.Unreadable(f"cannot be opened: {error.strerror}") from None

    def _example(self, index: int, image: Image.Image, rng: np.random.Generator | None) -> dict[str, Any]:
        size = self.shapes[self.buckets[index]] if len(self.shapes) > 1 else self.shapes[0]
        cond = {"label": self.index.labels[index]} if self.labels else {}
        example = {"x": self.transform(image, rng, size), "cond": cond}
        return {**example, "caption": self._caption(index)} if self.captions else example

    def _caption(self, index: int) -> str:
        """Returns the caption from the folder's metadata.jsonl, or from the `.txt` file next to the image."""
        if self.index.captions is not None:
            caption = self.index.captions[index].decode()
            if not caption:
                raise image_ops.Unreadable("has no caption in metadata.jsonl")
            return caption
        path = os.path.splitext(self.index.path(index))[0] + ".txt"
        try:
            with open(path, encoding="utf-8") as file:
                return file.read().strip()
        except OSError as error:
            raise image_ops.Unreadable(f"has no caption: {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise image_ops.Unreadable(f"has a caption that is not UTF-8: {path}, byte {error.start}") from None


def make(
    path: str,
    size: int | Size | tuple[Size, ...],
    channels: Literal[1, 3] = 3,
    crop: Literal["center", "random"] = "center",
    flip: bool = False,
    labels: bool = True,
    captions: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
    index: str | None = None,
) -> Folder:
    """Opens the JPEG, PNG and WebP images in a folder and its subfolders. Symbolic links are followed.

    Args:
      path: The folder.
      size: Size that images are resized to cover and then cropped to: a number for a square, (height, width), or a
        tuple of these. With several, each image takes the size of the nearest aspect ratio, and the examples of a batch
        have one size.
      channels: 3, or 1 for grey.
      crop: `center`, or `random` for a random part at a random scale of up to 1.25 in training.
      flip: Whether to mirror half of the images in training.
      labels: Whether the top-level directories are classes, in the order of their names.
      captions: Whether to read captions. They come from `metadata.jsonl` in the folder, with lines
        `{"file_name": ..., "text": ...}`, if it exists, and otherwise from the `.txt` file next to each image.
      on_error: What to do about an unreadable image. `raise` ends the run with an error that states its path; `skip`
        substitutes the next readable image and counts it in the metric `skipped`.
      index: Folder to store the index of the images in; defaults to `.index` in the folder itself.
    """
    several = isinstance(size, tuple) and isinstance(size[0], tuple)
    shapes = tuple(image_ops.check_size("size", one) for one in (size if several else (size,)))
    found = FileIndex(path, index)
    if not len(found):
        others = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in found.ignored.items())
        raise InputError("path", f"{path} contains no images" + (f", only other files: {others}" if others else ""))
    if labels and (found.labels < 0).any():
        first = found.path(int(np.argmax(found.labels < 0)))
        raise InputError("labels", f"{first} is in no top-level directory and so has no class; set labels=False")
    return Folder(found, image_ops.Transform(channels=channels, crop=crop, flip=flip), shapes, labels, captions,
                  skip=on_error == "skip")  # fmt: skip


def _nearest(sizes: np.ndarray, shapes: tuple[Size, ...]) -> np.ndarray:
    """Returns `[N]` int32, the index of the shape with the nearest aspect ratio for each (height, width).

    Unknown sizes, which are 0, get the index of the first shape's aspect ratio.
    """
    ratios = np.log([height / width for height, width in shapes])
    known = np.where(sizes.min(axis=1, keepdims=True) > 0, sizes, np.array(shapes[0]))
    image_ratios = np.log(known[:, 0] / known[:, 1])
    return np.abs(image_ratios[:, None] - ratios).argmin(axis=1).astype(np.int32)
