"""Decoding and transforms, compared with Pillow used step by step."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from diffusion.data import image_ops
from diffusion.data.image_ops import Transform, Unreadable, decode
from tests.refusals import refused


def noise(height, width, mode="RGB", seed=0):
    channels = {"L": (), "LA": (2,), "RGB": (3,), "RGBA": (4,), "CMYK": (4,)}[mode]
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, *channels), np.uint8), mode)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def guided_diffusion(image, side):
    """Follows `center_crop_arr` of guided-diffusion: halves by boxes, resizes bicubically and crops the center."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    pixels = np.asarray(image.resize([round(length * scale) for length in image.size], Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    return pixels[top : top + side, left : left + side]


@pytest.mark.parametrize(
    ("height", "width"), [(512, 512), (300, 401), (257, 130), (64, 64), (20, 33), (127, 640), (1, 1)]
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_resized_as_guided_diffusion_does(height, width, mode):
    image = noise(height, width, mode)
    x = Transform((64, 64), channels=3 if mode == "RGB" else 1)(image)
    expected = guided_diffusion(image, 64).reshape(64, 64, -1)
    assert x.dtype == np.uint8
    np.testing.assert_array_equal(x, expected)


def test_covers_a_size_that_is_not_square():
    image = Image.fromarray(np.tile(np.arange(200, dtype=np.uint8), (100, 1)))  # a horizontal gradient
    x = Transform((50, 40), channels=1)(image)
    assert x.shape == (50, 40, 1)
    # The image is halved to 50 x 100, and columns 30 to 69 are kept.
    np.testing.assert_allclose(x[0, :, 0], 2 * np.arange(30, 70) + 1, atol=0.51)


def test_pixels_are_unchanged():
    image = Image.fromarray(np.array([[0, 255, 51]], np.uint8))
    np.testing.assert_array_equal(Transform(channels=1)(image).ravel(), [0, 255, 51])


def test_nothing_is_random_without_a_generator():
    transform = Transform((32, 32), crop="random", flip=True)
    image = noise(80, 50)
    np.testing.assert_array_equal(transform(image), transform(image))
    np.testing.assert_array_equal(transform(image), Transform((32, 32))(image))


def test_center_crops_are_not_random_in_training():
    image = noise(80, 50)
    np.testing.assert_array_equal(Transform((32, 32))(image, np.random.default_rng(0)), Transform((32, 32))(image))


def test_random_crops_vary_in_position_and_scale():
    """Reads the corner and the height of each crop from an image whose pixels are their own coordinates."""
    rows, columns = np.mgrid[0:128, 0:128]
    image = Image.fromarray(np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8))
    transform, rng = Transform((32, 32), crop="random"), np.random.default_rng(0)
    seen = np.stack([transform(image, rng) for _ in range(300)]).astype(np.float32)
    top, left = seen[:, 0, 0, 0], seen[:, 0, 0, 1]
    height = seen[:, -1, 0, 0] - top
    # At a zoom of z the resized image is 32 z pixels wide, and a crop covers 128 / z pixels of the original.
    assert height.max() > 122 and 95 < height.min() < 106
    assert top.min() < 4 and left.min() < 4 and top.max() > 20 and left.max() > 20
    assert np.abs(np.corrcoef(top, left)[0, 1]) < 0.6  # both depend on the zoom


def test_half_of_the_images_are_mirrored():
    image, rng = noise(8, 8), np.random.default_rng(1)
    plain = Transform()(image)
    mirrored = [np.array_equal(Transform(flip=True)(image, rng), plain[:, ::-1]) for _ in range(400)]
    assert 160 < sum(mirrored) < 240
    np.testing.assert_array_equal(Transform(flip=False)(image, rng), plain)


def test_colour_and_grey():
    grey, colour = noise(4, 4, "L"), noise(4, 4)
    x = Transform(channels=3)(grey)
    assert x.shape == (4, 4, 3) and (x == x[..., :1]).all()
    expected = np.asarray(colour.convert("L"))[..., None]
    np.testing.assert_array_equal(Transform(channels=1)(colour), expected)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF"])
def test_lossless_formats(kind):
    image, options = noise(9, 7), {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(np.asarray(decode(encoded(image, kind, **options))), np.asarray(image))


@pytest.mark.parametrize("kind", ["MPO", "GIF", "TIFF", "PNG", "WEBP"])
def test_the_first_of_several_pictures_is_read(kind):
    first, options = noise(8, 8).quantize(16).convert("RGB"), {"lossless": True} if kind == "WEBP" else {}
    found = decode(encoded(first, kind, save_all=True, append_images=[noise(8, 8, seed=1)], **options))
    alone = decode(encoded(first, "JPEG" if kind == "MPO" else kind, **options))
    np.testing.assert_array_equal(np.asarray(found), np.asarray(alone))


def test_sixteen_bits_of_several_channels():
    """Pillow reads the first 8, which are the image unless fewer bits are significant."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + struct.pack(">HHH", 0, 40_000, 65_535))
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixel) + chunk(b"IEND", b"")
    np.testing.assert_array_equal(np.asarray(decode(data)), [[[0, 40_000 // 256, 255]]])
    with pytest.raises(Unreadable, match="several channels"):
        decode(data, bits=12)


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 257, 40_000, 65_535]], np.uint16)
    image = decode(encoded(Image.fromarray(values)))
    assert image.mode == "L"
    np.testing.assert_array_equal(np.asarray(image), np.round(values / 257).astype(np.uint8))


def test_palette():
    image = noise(8, 8).quantize(5)
    np.testing.assert_array_equal(np.asarray(decode(encoded(image))), np.asarray(image.convert("RGB")))


def test_cmyk():
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0] = 255  # cyan
    colour = np.asarray(decode(encoded(Image.fromarray(pixels, "CMYK"), "JPEG", quality=95)))
    assert colour.shape == (16, 16, 3)
    np.testing.assert_allclose(colour.mean(axis=(0, 1)), (0, 255, 255), atol=4)


def test_one_bit_and_grey_with_alpha():
    assert decode(encoded(noise(6, 6, "L").convert("1"))).mode == "L"
    assert decode(encoded(noise(6, 6, "LA"))).mode in ("L", "RGB")


@pytest.mark.parametrize("kind", ["alpha", "palette", "key"])
def test_transparent_pixels_become_white(kind):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:, 2:] = (200, 30, 40, 255)
    image = Image.fromarray(pixels, "RGBA")
    options = {}
    if kind == "palette":
        image = image.quantize(4)
    if kind == "key":
        image, options = image.convert("RGB"), {"transparency": (0, 0, 0)}
    seen = np.asarray(decode(encoded(image, **options)))
    assert (seen[:, :2] == 255).all()
    np.testing.assert_allclose(seen[:, 2:], np.broadcast_to((200, 30, 40), (4, 2, 3)), atol=2)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, kind):
    shown = np.arange(15, dtype=np.uint8).reshape(3, 5) * 16
    inverse = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: np.transpose,
            6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1)}  # fmt: skip
    stored = Image.fromarray(np.ascontiguousarray(inverse[orientation](shown)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    np.testing.assert_array_equal(np.asarray(decode(encoded(stored, kind, exif=exif))), shown)


def header_of(width, height):
    """Returns a PNG file that ends where its pixels begin."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + head
        + struct.pack(">I", zlib.crc32(head))
        + struct.pack(">I4s", 9, b"IDAT")
    )


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "empty"),
        (b"no image at all", "not an image"),
        (encoded(noise(64, 64), "JPEG")[:900], "truncated"),
        (encoded(noise(64, 64))[:900], "."),
        (encoded(noise(64, 64), "WEBP")[:200], "."),
        (encoded(noise(32, 32), "ICO"), "ICO"),
        (encoded(noise(64, 64), "GIF")[:200], "."),
        (encoded(noise(64, 64), "TIFF")[:900], "."),
        (encoded(noise(64, 64), "BMP")[:900], "."),
        (encoded(Image.new("F", (4, 4)), "TIFF"), "floating-point"),
        (encoded(Image.new("I", (4, 4), 70_000), "TIFF"), "70,000"),
        (header_of(20_000, 20_000), "400000000 pixels"),  # above Pillow's hard limit
        (header_of(10_000, 9_000), "10,000 x 9,000 pixels"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_unreadable(data, word):
    with pytest.raises(Unreadable, match=word):
        decode(data)


def test_a_long_strip_is_resized():
    image = decode(encoded(noise(20, 20_000)))
    assert Transform((64, 64))(image).shape == (64, 64, 3)


def test_a_strip_that_would_become_too_large_is_refused():
    with pytest.raises(Unreadable, match="10,240,000 x 512"):
        Transform((512, 512), channels=1)(Image.new("L", (20_000, 1)))


def test_check_size():
    assert image_ops.check_size("size", 64) == (64, 64) and image_ops.check_size("size", (32, 48)) == (32, 48)
    for size in (0, (8, -1), 20_000):
        with refused("size"):
            image_ops.check_size("size", size)
