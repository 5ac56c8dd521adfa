"""Images in a directory tree, with the top directories as classes and captions from text files."""

import os
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image

from diffusion.core.types import InputError, Spec
from diffusion.data import image_ops
from diffusion.data.file_index import FileIndex

Size = tuple[int, int]


class Folder:
    """Examples `[H, W, C]` in [-1, 1], with `label` and `caption` where they are asked for.

    Attributes:
      index: of the files.
      shapes: the sizes there are; more than one makes `buckets`.
      buckets: `[N]` int32, which of them each image is fitted to: that of the nearest ratio.
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
        self.spec = Spec(shape=shape, num_classes=len(self.class_names), captions=captions)
        self._told = set()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"there are {len(self)} examples, no number {index}")
        return self._readable(index, None)

    def draw(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        """The example with its random crop and flip."""
        return self._readable(index, rng)

    @property
    def stages(self) -> tuple[tuple[str, Callable], ...]:
        """What `self[index]` does, one after the other."""
        return (
            ("read", lambda index: (index, self._bytes(index))),
            ("decode", lambda read: (read[0], image_ops.decode(read[1]))),
            ("transform", lambda decoded: self._example(*decoded, None)),
        )

    def _readable(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """The example, or with `skip` the next of its bucket that can be read."""
        number = index
        for _ in range(len(self)):
            try:
                example = self._example(number, image_ops.decode(self._bytes(number)), rng)
                return {**example, "skipped": np.bool_(number != index)} if self.skip else example
            except image_ops.Unreadable as error:
                problem = f"{self.index.path(number)} {error}"
            if not self.skip:
                raise InputError("data", f"{problem}; mend or remove it, or set data.on_error='skip'")
            if number not in self._told:
                self._told.add(number)
                print(f"skipped: {problem}", file=sys.stderr)
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
        """From the folder's metadata.jsonl, or the `.txt` beside the image."""
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
    """JPEG, PNG and WebP images in a folder and the directories below it, links followed. What cannot be read is named
    with its path.

    Args:
      path: of the folder.
      size: that images are scaled to cover, and cropped to: a number for a square, (height, width), or several of
        these, of which each image takes that of the nearest ratio; a batch is of one size then.
      channels: 3, or 1 for grey.
      crop: the middle, or in training a random part at a random scale of up to 1.25.
      flip: mirror half of the images in training.
      labels: whether the folder's own directories are classes, in the order of their names.
      captions: whether to read them: from `metadata.jsonl` in the folder, lines of `{"file_name": ..., "text": ...}`,
        if it is there, or else from the `.txt` beside each image.
      on_error: what an image that cannot be read does: it ends the run, or the next one that can be read takes its
        place, which the metric `skipped` counts.
      index: folder to keep the list of images in; `.index` in the folder itself if not given.
    """
    several = isinstance(size, tuple) and isinstance(size[0], tuple)
    shapes = tuple(image_ops.check("size", one) for one in (size if several else (size,)))
    found = FileIndex(path, index)
    if not len(found):
        others = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in found.ignored.items())
        raise InputError("path", f"{path} has no images" + (f", but other files: {others}" if others else ""))
    if labels and (found.labels < 0).any():
        first = found.path(int(np.argmax(found.labels < 0)))
        raise InputError("labels", f"{first} lies in no directory, which would be its class; set labels=False")
    return Folder(found, image_ops.Transform(channels=channels, crop=crop, flip=flip), shapes, labels, captions,
                  skip=on_error == "skip")  # fmt: skip


def _nearest(sizes: np.ndarray, shapes: tuple[Size, ...]) -> np.ndarray:
    """`[N]` int32: for each (height, width) the shape of the nearest ratio, the first for one that is not known."""
    ratios = np.log([height / width for height, width in shapes])
    known = np.where(sizes.min(axis=1, keepdims=True) > 0, sizes, np.array(shapes[0]))
    mine = np.log(known[:, 0] / known[:, 1])
    return np.abs(mine[:, None] - ratios).argmin(axis=1).astype(np.int32)
