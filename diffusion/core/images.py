"""Draws samples as images."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from diffusion.core import files
from diffusion.core.arrays import scaled


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Converts [-1, 1] to 0 .. 255, rounded to the nearest integer and clipped; NaN becomes 0."""
    pixels = np.clip(np.round((np.asarray(x, np.float32) + 1) * 127.5), 0, 255)
    return np.where(np.isnan(pixels), 0, pixels).astype(np.uint8)


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """Converts 0 .. 255 to [-1, 1], float32."""
    return scaled(pixels)


def grid(images: np.ndarray, columns: int | None = None, *, min_side: int = 48, gap: int = 2) -> Image.Image:
    """Arranges images in a grid.

    Args:
      images: uint8 `[N, H, W, C]`, C = 1 or 3.
      columns: Number of columns; by default the grid is nearly square.
      min_side: Small images are enlarged by an integer factor so that their shorter side has at least this many pixels.
      gap: White pixels between the images.
    """
    num, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(num))
    rows = math.ceil(num / columns)
    factor = math.ceil(min_side / min(height, width))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    cell_h, cell_w = height * factor + gap, width * factor + gap
    sheet = np.full((rows * cell_h + gap, columns * cell_w + gap, channels), 255, np.uint8)
    for index, image in enumerate(images):
        top, left = index // columns * cell_h + gap, index % columns * cell_w + gap
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = image
    return Image.fromarray(sheet[:, :, 0] if channels == 1 else sheet)


def picture(x: np.ndarray, columns: int | None = None) -> Image.Image:
    """Draws samples.

    Args:
      x: Images `[N, H, W, 1 or 3]` in [-1, 1], the first 400 of which are drawn in a grid; latents `[N, H, W, C]`,
        whose channels are drawn next to each other and scaled from [-3, 3]; or points `[N, 2]`, drawn as a density.
      columns: Number of columns; by default the grid is nearly square.
    """
    return grid(_pixels(x[:400]), columns) if x.ndim == 4 else cloud(x)


def _pixels(x: np.ndarray) -> np.ndarray:
    """Returns uint8 images `[N, H, W, 1 or 3]`; other numbers of channels are tiled, `[N, H, C W, 1]`."""
    num, height, width, channels = x.shape
    if channels in (1, 3):
        return to_uint8(x)
    return to_uint8(np.moveaxis(x, 3, 2).reshape(num, height, channels * width, 1) / 3)


def labelled(rows: Sequence[np.ndarray], labels: Sequence[str]) -> Image.Image:
    """Draws rows of samples, each with its label to the left.

    Args:
      rows: Samples in [-1, 1], each `[N, H, W, C]` or points `[N, 2]`.
      labels: One label per row.
    """
    pictures = [grid(_pixels(x), len(x)) if x.ndim == 4 else cloud(x, side=240) for x in rows]
    font = ImageFont.load_default(14)
    margin = 12 + math.ceil(max(font.getlength(label) for label in labels))
    sheet = Image.new("RGB", (margin + pictures[0].width, sum(picture.height for picture in pictures)), "white")
    draw, top = ImageDraw.Draw(sheet), 0
    for picture, label in zip(pictures, labels, strict=True):
        sheet.paste(picture, (margin, top))
        draw.text((6, top + picture.height / 2), label, fill="black", font=font, anchor="lm")
        top += picture.height
    return sheet


def captioned(examples: Sequence[np.ndarray], texts: Sequence[str], *, min_side: int = 96) -> Image.Image:
    """Draws examples in a grid, each with its text below it.

    Args:
      examples: Images `[H, W, C]` in [-1, 1], or videos `[T, H, W, C]`, whose frames are drawn in a row; sizes may
        differ. Or points `[2]`, drawn together as one density.
      texts: One text per example; not drawn for points.
      min_side: See `grid`.
    """
    if examples[0].ndim == 1:
        return cloud(np.stack(examples))
    font = ImageFont.load_default(12)
    videos = [x if x.ndim == 4 else x[None] for x in examples]
    cells = [grid(_pixels(video), len(video), min_side=min_side) for video in videos]
    width, height = max(cell.width for cell in cells), max(cell.height for cell in cells)
    lines = [_wrapped(text, font, width - 4) for text in texts]
    height += 14 * max(map(len, lines)) + 6
    columns = max(1, min(len(cells), 1200 // width))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(cells) / columns) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (cell, text) in enumerate(zip(cells, lines, strict=True)):
        left, top = index % columns * width, index // columns * height
        sheet.paste(cell, (left, top))
        draw.multiline_text((left + 3, top + cell.height), "\n".join(text), fill="black", font=font, spacing=2)
    return sheet


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Breaks a text into lines of at most `width` pixels; a longer word gets its own line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def cloud(points: np.ndarray, *, side: int = 480, extent: float = 1.5) -> Image.Image:
    """Draws the density of points `[N, 2]`: their counts in 120 x 120 cells of the square [-extent, extent]^2."""
    cells = 120
    edges = np.linspace(-extent, extent, cells + 1)
    counts, _, _ = np.histogram2d(-points[:, 1], points[:, 0], bins=edges)
    shades = 255 * (1 - np.sqrt(counts / max(counts.max(), 1)))
    return Image.fromarray(shades.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)


def save_png(image: Image.Image, path: files.Path, texts: Mapping[str, str] | None = None) -> None:
    """Writes a PNG file atomically, with texts by keyword as metadata."""
    about = PngImagePlugin.PngInfo()
    for keyword, text in (texts or {}).items():
        about.add_text(keyword, text)  # in UTF-8 if it is not Latin-1
    with files.replace(path, "wb") as file:
        image.save(file, format="PNG", pnginfo=about)
