"""Writes samples to files as they are drawn, and resumes where an interrupted job stopped.

The folder holds `samples.png`, a picture of the first samples, with their prompts if there are any, and by `out_format`
  npz: `samples.npz`, or `samples_00000.npz`, `samples_00001.npz`, ... if there are more samples than fit into one file.
    The entries are `arr_0`, the samples under the name that ADM's evaluator reads, `labels`, `prompts` if there are
    any, and `settings` (JSON).
  png: `images/000000.png`, `images/000001.png`, ..., and `labels.csv`, also with the names of the classes. The names of
    samples with prompts end in these, as in `images/000000_a_red_circle.png`, and `prompts.csv` lists them. The texts
    `prompt` and `parameters` of the files say how they were made, as does that of `samples.png` for the first sample.
"""

import csv
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from diffusion.core import files, images
from diffusion.core.types import InputError, Spec
from diffusion.distributed import multihost
from diffusion.pipelines import png_parameters
from diffusion.pipelines.evaluation import Batches, not_finite
from diffusion.training.resilience.guards import Diverged

FORMATS = ("npz", "png")
PER_FILE = 10_000  # samples in an .npz file
SHOWN, SHOWN_POINTS = 400, 10_000  # samples in the picture
SHOWN_PROMPTS = 60  # samples in the picture with their prompts
PICTURE, LABELS, PROMPTS, IMAGES = "samples.png", "labels.csv", "prompts.csv", "images"
LONGEST_NAME = 60  # characters of a prompt in the name of a file
UNFINISHED = "unfinished.json"  # the settings, while samples are missing
WRITTEN = re.compile(rf"samples(_\d{{5,}})?\.npz|{IMAGES}/\d{{6,}}(_[\w-]*)?\.png|{LABELS}|{PROMPTS}|{PICTURE}")


def write_samples(
    batches: Callable[[int], Batches], out: str, *, labels: np.ndarray | None, num: int, spec: Spec,
    settings: Mapping[str, Any], out_format: str = "npz", columns: int | None = None,
    prompts: Sequence[str] | None = None, metadata: bool = True,
) -> str:  # fmt: skip
    """Draws samples and writes each file once its samples are drawn.

    A file is complete or absent. If an interrupted job is started again with the same settings, it resumes after the
    files that exist; otherwise the files of earlier jobs are removed first.

    Args:
      batches: `batches(first)` draws the samples from index `first` on.
      out: The folder.
      labels: The class of each sample, int32 `[num]`, or None.
      num: Number of samples.
      spec: What the samples look like.
      settings: What the samples depend on, JSON-able; with `metadata`, what `png_parameters.parameters` requires.
      out_format: One of `FORMATS`.
      columns: Number of columns of the picture.
      prompts: The prompt of each sample, or None.
      metadata: Whether PNG files say how they were made.

    Returns:
      Where the samples are: a file, the first and the last of several files, or a folder.

    Raises:
      InputError: The samples cannot be written in this format, or the folder cannot be written or is in use.
      Diverged: Samples are not finite; the files of those before them are kept.
    """
    if out_format == "png" and not spec.is_image:
        raise InputError("--out_format", f"png is for images, and samples of shape {spec.shape} are none; use npz")
    # The size of compressed images is not known.
    size = num * math.prod(spec.shape) * (1 if spec.is_image else 4) if out_format == "npz" else 0
    there = sum(path.stat().length for path in epath.Path(out).glob("samples*.npz"))  # is replaced or kept
    files.make_folder(out, "--out", size - there)
    settings = {**settings, "num": num, "out_format": out_format, "metadata": metadata}

    def about(index: int) -> dict[str, str]:
        if not metadata or not spec.is_image:
            return {}
        prompt = None if prompts is None else prompts[index]
        text = png_parameters.parameters(settings, spec.shape[:2], index, prompt)
        return ({} if prompt is None else {"prompt": prompt}) | {png_parameters.KEYWORD: text}

    if out_format == "npz":
        writer = _Npz(out, labels, num, settings, prompts)
    else:
        writer = _Png(out, labels, num, spec.class_names, prompts, about)
    with files.writing(out, "--out"), multihost.locked(out, "--out", remove=True):
        first = done = multihost.broadcast_from_first(_prepare(out, settings, writer) if files.writes() else 0)
        most = SHOWN_PROMPTS if prompts is not None else SHOWN if len(spec.shape) == 3 else SHOWN_POINTS
        shown, kept = min(num, most), []
        for x, _ in batches(first) if first < num else ():
            bad = not_finite(x)
            if bad:
                problem = f"{bad} of the samples {done} to {done + len(x) - 1} are not finite"
                raise Diverged(f"{problem}; choose another checkpoint, average or sampler")
            if first == 0 and done < shown:
                kept.append(x)
                if done + len(x) >= shown:
                    first_samples = np.concatenate(kept)[:shown]
                    captioned = prompts is not None and len(spec.shape) > 1
                    picture = (
                        images.captioned(first_samples, prompts[:shown])
                        if captioned
                        else images.picture(first_samples, columns)
                    )
                    images.save_png(picture, os.path.join(out, PICTURE), about(0))
            writer.add(done, images.to_uint8(x) if spec.is_image else x)
            done += len(x)
        if files.writes():
            epath.Path(out, UNFINISHED).unlink()
    return writer.where


class _Npz:
    def __init__(
        self, out: str, labels: np.ndarray | None, num: int, settings: Mapping[str, Any],
        prompts: Sequence[str] | None = None,
    ):  # fmt: skip
        self.prompts = None if prompts is None else np.array(prompts, str)
        self.labels = np.zeros(num, np.int32) if labels is None else labels
        self.num, self.settings, self.rows = num, files.json_text(settings), None
        name = "samples.npz" if num <= PER_FILE else "samples_{:05d}.npz"
        self.paths = [os.path.join(out, name.format(index)) for index in range(-(-num // PER_FILE))]
        self.where = self.paths[0] if num <= PER_FILE else f"{self.paths[0]} to {os.path.basename(self.paths[-1])}"

    def done(self) -> int:
        """Returns how many of the first samples are in files."""
        there = itertools.takewhile(lambda path: epath.Path(path).exists(), self.paths)
        return min(sum(PER_FILE for _ in there), self.num)

    def add(self, start: int, x: np.ndarray) -> None:
        """Adds samples, of which the first has the index `start`."""
        while len(x):
            index, row = divmod(start, PER_FILE)
            if row == 0:  # one array per file, so that its samples are never held twice
                self.rows = np.empty((min(PER_FILE, self.num - start), *x.shape[1:]), x.dtype)
            part, x = np.split(x, [PER_FILE - row])
            self.rows[row : row + len(part)] = part
            start += len(part)
            if row + len(part) == len(self.rows):
                self._save(index)

    def _save(self, index: int) -> None:
        labels = self.labels[index * PER_FILE :][: len(self.rows)]
        given = {} if self.prompts is None else {"prompts": self.prompts[index * PER_FILE :][: len(self.rows)]}
        if files.writes():
            with files.replace(self.paths[index], "wb") as file:
                np.savez(file, arr_0=self.rows, labels=labels, **given, settings=np.array(self.settings))


class _Png:
    def __init__(
        self, out: str, labels: np.ndarray | None, num: int, class_names: Sequence[str],
        prompts: Sequence[str] | None, about: Callable[[int], Mapping[str, str]],
    ):  # fmt: skip
        self.out, self.labels, self.num, self.where = out, labels, num, os.path.join(out, IMAGES)
        self.class_names, self.prompts, self.about = class_names, prompts, about

    def done(self) -> int:
        """Returns how many of the first samples are in files."""
        return next(index for index in range(self.num + 1) if not epath.Path(self._path(index)).exists())

    def add(self, start: int, x: np.ndarray) -> None:
        """Adds samples, of which the first has the index `start`."""
        if start == 0:
            files.make_folder(self.where, "--out")
            if self.labels is not None:
                rows = [("file", "label", "class")[: 3 if self.class_names else 2]]
                for index, label in enumerate(self.labels):
                    rows.append((f"{index:06d}.png", label, *self.class_names[label : label + 1]))
                with files.replace(os.path.join(self.out, LABELS)) as file:
                    csv.writer(file, lineterminator="\n").writerows(rows)
            if self.prompts is not None:
                rows = [("file", "prompt"), *((self._name(index), prompt) for index, prompt in enumerate(self.prompts))]
                with files.replace(os.path.join(self.out, PROMPTS)) as file:
                    csv.writer(file, lineterminator="\n").writerows(rows)
        if files.writes():
            for index, image in enumerate(x, start):
                image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
                images.save_png(image, self._path(index), self.about(index))

    def _path(self, index: int) -> str:
        return os.path.join(self.where, self._name(index))

    def _name(self, index: int) -> str:
        return f"{index:06d}{'' if self.prompts is None else file_name(self.prompts[index])}.png"


def file_name(prompt: str) -> str:
    """Returns a prompt as the end of a file's name: `_` and its letters, digits and hyphens; others become `_`."""
    words = re.sub(r"[^\w-]+", "_", prompt, flags=re.ASCII).strip("_")[:LONGEST_NAME].rstrip("_")
    return f"_{words}" if words else ""


def _prepare(out: str, settings: Mapping[str, Any], writer: _Npz | _Png) -> int:
    """Returns how many samples of an interrupted job with these settings exist; removes the files of other jobs."""
    folder, text = epath.Path(out), files.json_text(settings)
    marker = folder / UNFINISHED
    if marker.exists() and marker.read_text() == text and (folder / PICTURE).exists():
        return writer.done()
    for path in itertools.chain(folder.glob("*"), folder.glob(f"{IMAGES}/*")):
        if WRITTEN.fullmatch(path.relative_to(folder).as_posix()):
            path.unlink()
    with files.replace(marker) as file:
        file.write(text)
    return 0
