"""From the bytes of an image file to the array that a network sees: decode, resize, crop, flip, scale."""

import dataclasses
import io
import math
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from diffusion.core.types import InputError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 89_478_485  # of one image, as it is and as it is resized; Pillow's own limit
ZOOM = 1.25  # of the image that a random crop is taken from, at most; guided-diffusion's

Size = tuple[int, int]  # height, width


class Unreadable(Exception):
    """An example that cannot be read: what is wrong with it."""


def decode(data: bytes) -> Image.Image:
    """An image file as 8-bit `RGB` or `L`, upright as its EXIF orientation says, on white where it is transparent.

    Raises:
      Unreadable: it is no JPEG, PNG or WebP, or a damaged, animated or enormous one.
    """
    if not data:
        raise Unreadable("is empty")
    try:
        image = Image.open(io.BytesIO(data))
        if image.format not in FORMATS:
            raise Unreadable(f"is a {image.format} file; JPEG, PNG and WebP are read")
        if getattr(image, "is_animated", False):
            raise Unreadable(f"is animated, of {image.n_frames} frames")
        _check_pixels(image.size, "is")
        image.load()
        if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
            image = ImageOps.exif_transpose(image)
        return _plain(image)
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable("is no image") from None
    except Exception as error:  # Pillow's parsers raise whatever they run into
        raise Unreadable(f"is damaged: {error}") from None


@dataclasses.dataclass(frozen=True)
class Transform:
    """What is done to a decoded image.

    Attributes:
      size: (height, width) of the result; None leaves the image's own.
      channels: 3, or 1 for grey.
      crop: which part of an image that covers `size` is taken: its middle, or, in training, a random part of one up to
        1.25 times as large.
      flip: whether half of the images are mirrored left to right in training.
    """

    size: Size | None = None
    channels: Literal[1, 3] = 3
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    def __call__(
        self, image: Image.Image, rng: np.random.Generator | None = None, size: Size | None = None
    ) -> np.ndarray:
        """An image in mode RGB or L as `[H, W, channels]` float32 in [-1, 1].

        Args:
          rng: for the random crop and flip of training; without, the middle, never mirrored.
          size: (height, width) for this image alone.

        Raises:
          Unreadable: it would be enormous once it covers `size`.
        """
        mode = "RGB" if self.channels == 3 else "L"
        if image.mode != mode:
            image = image.convert(mode)
        size = size or self.size
        if size:
            image = _fit(image, size, rng if self.crop == "random" else None)
        if rng is not None and self.flip and rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image).reshape(image.height, image.width, self.channels)
        return pixels / np.float32(127.5) - np.float32(1)


def check(name: str, value: int | Size) -> Size:
    """A size as configs give it, a number for a square, as (height, width). Raises InputError naming `name`."""
    size = (value, value) if isinstance(value, int) else value
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise InputError(name, f"must be at least 1 and have no more than {MAX_PIXELS:,} pixels, got {value}")
    return size


def _plain(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip and not scale
        return Image.fromarray(np.round(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode in ("RGB", "L") else image.convert("L" if image.mode == "1" else "RGB")


def _fit(image: Image.Image, size: Size, rng: np.random.Generator | None) -> Image.Image:
    """The image scaled to cover a size and cropped to it, as guided-diffusion does: halved by boxes while it is twice
    as large or more, then resized by bicubic interpolation."""
    height, width = size
    zoom = 1.0
    if rng is not None:
        side = min(size)
        zoom = rng.integers(side, math.ceil(side * ZOOM), endpoint=True) / side
    while image.height >= 2 * height * zoom and image.width >= 2 * width * zoom:
        image = _halved(image)
    scale = max(height * zoom / image.height, width * zoom / image.width)
    covering = round(image.width * scale), round(image.height * scale)
    _check_pixels(covering, f"is {image.width} x {image.height}, which makes it")
    image = image.resize(covering, Image.Resampling.BICUBIC)
    free = image.height - height, image.width - width
    top, left = (space // 2 if rng is None else int(rng.integers(space, endpoint=True)) for space in free)
    return image.crop((left, top, left + width, top + height))


def _halved(image: Image.Image) -> Image.Image:
    """The means of 2 x 2 pixels, to the bit those of Pillow's BOX filter, which rounds up after each axis, in a third
    of its time: a pixel's channels are averaged together, as one number."""
    width, height = image.width // 2, image.height // 2
    if image.mode != "RGB" or image.width % 2 or image.height % 2:
        return image.resize((width, height), Image.Resampling.BOX)
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(2 * height, 2 * width)
    rows = _mean(pixels[:, ::2], pixels[:, 1::2])
    return Image.frombytes("RGB", (width, height), _mean(rows[::2], rows[1::2]).tobytes(), "raw", "RGBX")


def _mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Byte by byte, halves rounded up: a | b holds what both have and what one has, of which half is too much."""
    return (a | b) - (((a ^ b) >> np.uint32(1)) & np.uint32(0x7F7F7F7F))


def _check_pixels(size: tuple[int, int], what: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise Unreadable(f"{what} {size[0]:,} x {size[1]:,} pixels; the limit is {MAX_PIXELS:,}")
