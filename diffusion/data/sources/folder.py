"""Images in a directory tree, with the top-level directories as classes and captions from text files."""

import contextlib
import logging
import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from PIL import Image

from diffusion.core.types import ArraySpec, InputError, Spec, class_labels
from diffusion.data import image_ops
from diffusion.data import size_conditions as conditions
from diffusion.data.file_index import CAPTION_EXTENSIONS, FileIndex

LOCATION_KEYWORDS = ("path", "index", "on_error")  # see pipeline.location_keywords
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}
LOOKED_AT = 4  # images whose number of bits is measured when a folder is opened

Size = tuple[int, int]

logger = logging.getLogger(__name__)


class Folder:
    """Examples `[H, W, C]` uint8, with `label` and `caption` if requested.

    Attributes:
      index: The index of the files.
      numbers: The label of each of the index's classes, whose order may differ.
      shapes: The sizes of the examples. If there are several, the source has `buckets`.
      buckets: `[N]` int32, the index in `shapes` of each image's size, the one with the nearest aspect ratio.
    """

    def __init__(
        self, index: FileIndex, transform: image_ops.Transform, shapes: tuple[Size, ...], classes: tuple[str, ...],
        captions: bool, skip: bool, bits: int, size_conditions: conditions.Kind | None,
    ):  # fmt: skip
        self.index, self.transform, self.shapes, self.skip, self.bits = index, transform, shapes, skip, bits
        self.labels, self.captions, self.size_conditions = bool(classes), captions, size_conditions
        label_of = {name: label for label, name in enumerate(classes)}
        self.numbers = np.array([label_of.get(name, -1) for name in index.class_names], np.int32)
        if len(shapes) > 1:
            self.buckets = _nearest(index.sizes(), shapes)
        height, width = shapes[0]
        shape = (height, width, transform.channels)
        described = class_labels(len(classes), classes) | dict(conditions.SPECS.get(size_conditions, {}))
        self.spec = Spec(ArraySpec(shape, dtype="uint8"), described, captions)
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
            ("decode", lambda read: (read[0], image_ops.decode(read[1], self.bits))),
            ("transform", lambda decoded: self._example(*decoded, None)),
        )

    def _readable(self, index: int, rng: np.random.Generator | None) -> dict[str, Any]:
        """Returns the example or, with `skip`, the next one of its bucket that can be read."""
        number = index
        for _ in range(len(self)):
            try:
                example = self._example(number, image_ops.decode(self._bytes(number), self.bits), rng)
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
        cond = {"label": self.numbers[self.index.labels[index]]} if self.labels else {}
        x, crop = self.transform.with_crop(image, rng, size)
        if self.size_conditions:
            cond |= conditions.of_example(self.size_conditions, (image.height, image.width), crop, size)
        example = {"x": x, "cond": cond}
        return {**example, "caption": self._caption(index)} if self.captions else example

    def _caption(self, index: int) -> str:
        """Returns the caption from the folder's metadata, or from the file next to the image."""
        if self.index.captions is not None:
            caption = self.index.captions[index].decode()
            if not caption:
                raise image_ops.Unreadable("has no caption in the metadata")
            return caption
        stem = os.path.splitext(self.index.path(index))[0]
        paths = [stem + extension for extension in CAPTION_EXTENSIONS]
        path = next(filter(os.path.lexists, paths), paths[0])
        try:
            with open(path, encoding="utf-8-sig") as file:
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
    class_order: Literal["number", "name"] = "number",
    bits: int = 16,
    buckets: int | None = None,
    size_conditions: conditions.Kind | None = None,
) -> Folder:
    """Opens the JPEG, PNG, WebP, GIF, BMP and TIFF images in a folder and its subfolders.

    Symbolic links are followed. Of a file with several pictures, the first is read.

    Args:
      path: The folder.
      size: Size that images are resized to cover and then cropped to: a number for a square, (height, width), or a
        tuple of these. With several, each image takes the size of the nearest aspect ratio, and the examples of a batch
        have one size.
      channels: 3, or 1 for grey.
      crop: `center`, or `random` for a random part at a random scale of up to 1.25 in training.
      flip: Whether to mirror half of the images in training.
      labels: Whether the top-level directories are classes, in the order of their names.
      captions: Whether to read captions. They come from `metadata.jsonl` files, with lines `{"file_name": ..., "text":
        ...}`, or `metadata.csv` files with these columns, if there are any; the names are relative to the file's
        folder. Otherwise they come from the `.txt` or `.caption` file next to each image.
      on_error: What to do about an unreadable image. `raise` ends the run with an error that states its path; `skip`
        substitutes the next readable image and counts it in the metric `skipped`.
      index: Folder to store the index of the images in; defaults to `.index` in the folder itself.
      class_order: `number` orders directories whose names are all whole numbers by their value, and others by name.
        `name` orders all by name: 0, 1, 10, 2.
      bits: Significant bits of grey images of 16 bits, from 8 to 16: with 12, the value 4095 is white.
      buckets: A number of pixels of which the sides of all sizes are multiples, such as 64. It replaces a single `size`
        by sizes of many aspect ratios with about as many pixels (`image_ops.bucket_sizes`).
      size_conditions: The conditions that say how an image was resized and cropped. `sdxl`: the vector `time_ids`.
        `pixart`: `resolution` and `aspect_ratio`. See `data.size_conditions`.
    """
    if not 8 <= bits <= 16:
        raise InputError("bits", f"must be from 8 to 16, got {bits}")
    several = isinstance(size, tuple) and isinstance(size[0], tuple)
    shapes = tuple(image_ops.check_size("size", one) for one in (size if several else (size,)))
    if buckets is not None and several:
        raise InputError("buckets", "must be None with several sizes; give one size, or leave buckets out")
    if buckets is not None:
        shapes = image_ops.bucket_sizes(shapes[0], buckets)
    found = FileIndex(path, index)
    if not len(found):
        others = ", ".join(f"{count} {extension or 'without extension'}" for extension, count in found.ignored.items())
        problem = f"{path} contains no {image_ops.READ} images"
        raise InputError("path", problem + (f", only other files: {others}" if others else ""))
    _, others = image_ops.extensions()
    unread = ", ".join(f"{count} {extension}" for extension, count in found.ignored.items() if extension in others)
    if unread:
        logger.warning("%s: left out images of formats that are not read: %s; convert them", path, unread)
    if not labels and len(found.class_names) > 1 and _are_splits(found.class_names):
        logger.warning("%s: %s are one data set here", path, " and ".join(found.class_names))
    if captions:
        _check_captions(found, on_error)
    if bits == 16:
        _warn_of_bits(found)
    transform, skip = image_ops.Transform(channels=channels, crop=crop, flip=flip), on_error == "skip"
    classes = _classes(found, class_order) if labels else ()
    return Folder(found, transform, shapes, classes, captions, skip, bits, size_conditions)


def _classes(index: FileIndex, order: str) -> tuple[str, ...]:
    """Returns the names of the classes in the order of their labels."""
    names = index.class_names
    if (index.labels < 0).any():
        first = index.path(int(np.argmax(index.labels < 0)))
        raise InputError("labels", f"{first} is in no top-level directory and so has no class; set labels=False")
    if _are_splits(names):
        one = os.path.join(index.root, names[0])
        problem = f"{index.root} has the splits {' and '.join(names)} as its top-level directories, not classes"
        raise InputError("path", f"{problem}; give one of them, such as {one}, or set labels=False")
    if index.empty:
        logger.warning("%s: no class without images: %s", index.root, ", ".join(index.empty))
    by_value = order == "number" and all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=int)) if by_value else names


def _are_splits(names: tuple[str, ...]) -> bool:
    """Returns whether top-level directories are the splits of a data set and not its classes."""
    return {name.lower() for name in names} <= SPLITS


def _check_captions(index: FileIndex, on_error: str) -> None:
    """Reads the captions that the index stores, and reports images that have none."""
    index.read_captions()
    if index.captions is None:
        count, first = index.without_text
    else:
        missing = np.flatnonzero(np.diff(index.captions.ends, prepend=np.uint64(0)) == 0)
        count, first = len(missing), index.path(int(missing[0])) if len(missing) else ""
    if count == 0:
        return
    where = "next to them or in metadata.jsonl or metadata.csv" if index.captions is None else "in the metadata"
    problem = f"{count:,} of the {len(index):,} images have no caption {where}, the first is {first}"
    if on_error == "raise":
        raise InputError("captions", f"{problem}; add them, or set on_error='skip'")
    logger.warning("skipped: %s", problem)


def _warn_of_bits(index: FileIndex) -> None:
    """Warns of 16-bit images whose values use fewer bits, which would be dark."""
    found = []
    for number in np.linspace(0, len(index) - 1, min(LOOKED_AT, len(index)), dtype=int):
        with contextlib.suppress(OSError, InputError), open(index.path(int(number)), "rb") as file:
            found.append(image_ops.significant_bits(file.read()))
    used = max((bits for bits in found if bits is not None), default=16)
    if used <= 14:
        problem = f"{index.root}: the values of its 16-bit images take {used} bits, so that they are dark"
        logger.warning("%s; if this is not intended, set data.bits, such as %d", problem, max(used + used % 2, 8))


def _nearest(sizes: np.ndarray, shapes: tuple[Size, ...]) -> np.ndarray:
    """Returns `[N]` int32, the index of the shape with the nearest aspect ratio for each (height, width).

    Unknown sizes, which are 0, get the index of the first shape's aspect ratio.
    """
    ratios = np.log([height / width for height, width in shapes])
    known = np.where(sizes.min(axis=1, keepdims=True) > 0, sizes, np.array(shapes[0]))
    image_ratios = np.log(known[:, 0] / known[:, 1])
    return np.abs(image_ratios[:, None] - ratios).argmin(axis=1).astype(np.int32)
