"""Image operations from the bytes of a file to the pixels of an example: decode, resize, crop, flip."""

import dataclasses
import io
import math
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps

from diffusion.core.types import InputError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # MPO is a JPEG file with further pictures
READ = "JPEG, PNG, WebP, GIF, BMP or TIFF"
# Extensions of image formats that Pillow may not know.
OTHER_EXTENSIONS = (".heic", ".heif", ".avif", ".jxl", ".svg", ".dng", ".cr2", ".nef", ".arw")
MAX_PIXELS = 89_478_485  # limit for an image both before and after resizing; Pillow's default
ZOOM = 1.25  # a random crop is taken from an image of up to this many times its size, as in guided-diffusion

Size = tuple[int, int]  # height, width


class Unreadable(Exception):
    """Raised for an example that cannot be read. The message is a predicate, such as "is empty"."""


def extensions() -> tuple[frozenset[str], frozenset[str]]:
    """Returns the file name extensions of the formats that are read, and those of other image formats."""
    kinds = Image.registered_extensions()
    read = frozenset(extension for extension, kind in kinds.items() if kind in FORMATS)
    return read, frozenset((*kinds, *OTHER_EXTENSIONS)) - read


def orientation(image: Image.Image) -> int:
    """Returns the EXIF orientation of an image, from 1 to 8; 1 for files whose EXIF data cannot be read."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1


def decode(data: bytes, bits: int = 16) -> Image.Image:
    """Decodes the first picture of an image file to 8-bit `RGB` or `L`.

    The EXIF orientation is applied, and transparent images are placed on white.

    Args:
      data: The content of the file.
      bits: Significant bits of grey images with more than 8 bits; their values are at most `2**bits - 1`, which is
        white.

    Raises:
      Unreadable: The file has none of the formats that are read, or it is corrupt or too large, or has larger values.
    """
    if not data:
        raise Unreadable("is empty")
    try:
        image = Image.open(io.BytesIO(data))
        if image.format not in FORMATS:
            raise Unreadable(f"is a {image.format} file; must be {READ}")
        _check_pixels(image.size, "is")
        if bits < 16 and not image.mode.startswith("I") and any(";16" in str(tile.args) for tile in image.tile):
            raise Unreadable("has 16 bits in several channels, of which the first 8 are read; set bits to 16")
        image.load()
        if orientation(image) != 1:
            image = ImageOps.exif_transpose(image)
        return _plain(image, bits)
    except Unreadable:
        raise
    except Image.UnidentifiedImageError:
        raise Unreadable("is not an image") from None
    except Exception as error:  # Pillow's parsers raise errors of many types
        raise Unreadable(f"is corrupt: {error}") from None


@dataclasses.dataclass(frozen=True)
class Transform:
    """A transform from a decoded image to the pixels of an example.

    Attributes:
      size: (height, width) of the result; None keeps the size of the image.
      channels: 3, or 1 for grey.
      crop: `center` resizes the image to cover `size` and takes its center. `random`, in training, resizes it to up to
        1.25 times that size and takes a random part.
      flip: Whether to mirror half of the images left to right in training.
    """

    size: Size | None = None
    channels: Literal[1, 3] = 3
    crop: Literal["center", "random"] = "center"
    flip: bool = False

    def __call__(
        self, image: Image.Image, rng: np.random.Generator | None = None, size: Size | None = None
    ) -> np.ndarray:
        """Returns an image in mode RGB or L as `[H, W, channels]` uint8.

        Args:
          rng: Generator for the random crop and flip of training. Without it, the center is taken and not mirrored.
          size: (height, width) for this image, in place of the attribute.

        Raises:
          Unreadable: The image would be too large once it covers `size`.
        """
        return self.with_crop(image, rng, size)[0]

    def with_crop(
        self, image: Image.Image, rng: np.random.Generator | None = None, size: Size | None = None
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Returns what a call returns, and how many rows and columns of the resized image were cut off at its top and
        its left; of the mirrored image, if it was mirrored."""
        mode = "RGB" if self.channels == 3 else "L"
        if image.mode != mode:
            image = image.convert(mode)
        size, cut = size or self.size, (0, 0, 0)
        if size:
            image, cut = _fit(image, size, rng if self.crop == "random" else None)
        top, left, right = cut
        if rng is not None and self.flip and rng.random() < 0.5:
            image, left = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), right
        return np.asarray(image).reshape(image.height, image.width, self.channels), (top, left)


def check_size(name: str, value: int | Size) -> Size:
    """Returns a size from a config, where a number stands for a square, as (height, width).

    Raises:
      InputError: The size is not positive or too large; the error names the field `name`.
    """
    size = (value, value) if isinstance(value, int) else value
    if min(size) < 1 or size[0] * size[1] > MAX_PIXELS:
        raise InputError(name, f"must be at least 1 with at most {MAX_PIXELS:,} pixels in total, got {value}")
    return size


def bucket_sizes(size: Size, step: int) -> tuple[Size, ...]:
    """Returns sizes of many aspect ratios with about as many pixels as `size`, which comes first.

    The longer side is a multiple of `step`, of at most twice the square root of the number of pixels. The shorter one
    is the largest multiple with which there are no more pixels than in `size`. For 1024 x 1024 and a step of 64 these
    are 33 sizes from 512 x 2048 to 2048 x 512, as SDXL has them (Podell et al. 2023, arXiv 2307.01952, appendix I).

    Raises:
      InputError: The sides of `size` are not multiples of `step`; the error names the field `buckets`.
    """
    if step < 1 or size[0] % step or size[1] % step:
        raise InputError("buckets", f"must be positive and divide the sides of the size {size}, got {step}")
    pixels, found = size[0] * size[1], [size]
    for longer in range(step, 2 * math.isqrt(pixels) + 1, step):
        shorter = pixels // longer // step * step
        if step <= shorter <= longer:
            found += [(shorter, longer), (longer, shorter)]
    return tuple(dict.fromkeys(found))


def significant_bits(data: bytes) -> int | None:
    """Returns the number of bits that the largest value of a grey image of 16 bits takes; None for other files."""
    try:
        image = Image.open(io.BytesIO(data))
        if not image.mode.startswith("I") or image.width * image.height > MAX_PIXELS:
            return None
        return int(np.asarray(image).max()).bit_length()
    except Exception:  # decoding the image reports what is wrong
        return None


def _plain(image: Image.Image, bits: int) -> Image.Image:
    """Converts an image of any mode to 8-bit `RGB` or `L`."""
    if image.mode == "F":
        raise Unreadable("has floating-point pixels; must have integers of 8 or 16 bits")
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip instead of scaling
        values, white = np.asarray(image), (1 << bits) - 1
        if values.min() < 0 or values.max() > white:
            raise Unreadable(f"has values from {values.min()} to {values.max():,}; must be from 0 to {white:,}")
        return Image.fromarray(np.round(values.astype(np.float32) / (white / 255)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode in ("RGB", "L") else image.convert("L" if image.mode == "1" else "RGB")


def _fit(image: Image.Image, size: Size, rng: np.random.Generator | None) -> tuple[Image.Image, tuple[int, int, int]]:
    """Resizes an image to cover a size and crops it to that size, as guided-diffusion does.

    The image is halved with a box filter while it is at least twice as large, then resized by bicubic interpolation.
    With a generator, the scale and the position of the crop are random.

    Returns:
      The image, and what was cut off at its top, its left and its right.
    """
    height, width = size
    zoom = 1.0
    if rng is not None:
        side = min(size)
        zoom = rng.integers(side, math.ceil(side * ZOOM), endpoint=True) / side
    while image.height >= 2 * height * zoom and image.width >= 2 * width * zoom:
        image = _halved(image)
    scale = max(height * zoom / image.height, width * zoom / image.width)
    covering = round(image.width * scale), round(image.height * scale)
    _check_pixels(covering, f"is {image.width} x {image.height} and would be resized to")
    image = image.resize(covering, Image.Resampling.BICUBIC)
    free = image.height - height, image.width - width
    top, left = (space // 2 if rng is None else int(rng.integers(space, endpoint=True)) for space in free)
    return image.crop((left, top, left + width, top + height)), (top, left, free[1] - left)


def _halved(image: Image.Image) -> Image.Image:
    """Halves an image by averaging 2 x 2 pixels.

    The result equals that of Pillow's BOX filter, which rounds up after each axis, bit for bit. It takes a third of the
    time, because the channels of a pixel are averaged together as one 32-bit number.
    """
    width, height = image.width // 2, image.height // 2
    if image.mode != "RGB" or image.width % 2 or image.height % 2:
        return image.resize((width, height), Image.Resampling.BOX)
    pixels = np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(2 * height, 2 * width)
    rows = _mean(pixels[:, ::2], pixels[:, 1::2])
    return Image.frombytes("RGB", (width, height), _mean(rows[::2], rows[1::2]).tobytes(), "raw", "RGBX")


def _mean(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the byte-wise mean, with halves rounded up.

    It uses (a + b + 1) // 2 = (a | b) - ((a ^ b) >> 1); the mask removes the bits that the shift moves across bytes.
    """
    return (a | b) - (((a ^ b) >> np.uint32(1)) & np.uint32(0x7F7F7F7F))


def _check_pixels(size: tuple[int, int], what: str) -> None:
    if size[0] * size[1] > MAX_PIXELS:
        raise Unreadable(f"{what} {size[0]:,} x {size[1]:,} pixels; must have at most {MAX_PIXELS:,}")
