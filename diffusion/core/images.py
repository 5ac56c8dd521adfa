"""Pictures of samples."""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion.core import files


def to_uint8(x: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0 .. 255, rounded to the nearest and cut at the ends."""
    return np.clip(np.round((np.asarray(x, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def from_uint8(pixels: np.ndarray) -> np.ndarray:
    """0 .. 255 -> [-1, 1], float32."""
    return pixels.astype(np.float32) / 127.5 - 1


def grid(images: np.ndarray, columns: int | None = None, *, min_side: int = 48, gap: int = 2) -> Image.Image:
    """Images side by side.

    Args:
      images: uint8 `[N, H, W, C]`, C = 1 or 3.
      columns: of the grid; a near-square if left out.
      min_side: small images are enlarged by whole factors to at least so many pixels.
      gap: white pixels between them.
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
    """Samples: images `[N, H, W, C]` in [-1, 1] side by side, the first 400; latents likewise, their channels in a row,
    from -3 to 3; points `[N, 2]` as a cloud."""
    return grid(_pixels(x[:400]), columns) if x.ndim == 4 else cloud(x)


def _pixels(x: np.ndarray) -> np.ndarray:
    """uint8 `[N, H, W, 1 or 3]`; of another number of channels `[N, H, C W, 1]`."""
    num, height, width, channels = x.shape
    if channels in (1, 3):
        return to_uint8(x)
    return to_uint8(np.moveaxis(x, 3, 2).reshape(num, height, channels * width, 1) / 3)


def labelled(rows: Sequence[np.ndarray], labels: Sequence[str]) -> Image.Image:
    """A contact sheet: a row of samples for each label, which stands before it.

    Args:
      rows: samples in [-1, 1], each `[N, H, W, C]` or points `[N, 2]`.
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
    """A sheet of single examples, each with its text below it.

    Args:
      examples: in [-1, 1], `[H, W, C]`, or videos `[T, H, W, C]`, whose frames stand in a row; or points `[2]`, which
        make one cloud. They need not be of one size.
    """
    if examples[0].ndim == 1:
        return cloud(np.stack(examples))
    font = ImageFont.load_default(12)
    cells = [grid(_pixels(x if x.ndim == 4 else x[None]), len(x) if x.ndim == 4 else 1, min_side=min_side)
             for x in examples]  # fmt: skip
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
    """Its words in lines of no more than a width in pixels, where a word is not wider itself."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def cloud(points: np.ndarray, *, side: int = 480, extent: float = 1.5) -> Image.Image:
    """How many of the points `[N, 2]` lie in each of 120 x 120 cells of the square [-extent, extent]^2, the darker the
    more."""
    cells = 120
    edges = np.linspace(-extent, extent, cells + 1)
    counts, _, _ = np.histogram2d(-points[:, 1], points[:, 0], bins=edges)
    shades = 255 * (1 - np.sqrt(counts / max(counts.max(), 1)))
    return Image.fromarray(shades.astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)


def save_png(image: Image.Image, path: str) -> None:
    """Writes a PNG that is there whole or not at all."""
    with files.replace(path, "wb") as file:
        image.save(file, format="PNG")
