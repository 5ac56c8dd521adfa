"""The index of a folder's images: built by one walk over the folder, stored on disk and memory-mapped from there.

It takes a few tens of bytes of memory per image.
"""

import contextlib
import csv
import json
import logging
import os
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
from PIL import Image

from diffusion.core import files, locks
from diffusion.core.types import InputError
from diffusion.data import image_ops

FOLDER = ".index"  # inside the folder that is indexed
HEADER = "index.json"
FORMAT = 2
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # the last one is refused by name
CAPTION_EXTENSIONS = (".txt", ".caption")  # of files next to the images
THREADS = 8  # reading the sizes of images mostly waits for the disk

logger = logging.getLogger(__name__)


class PackedStrings:
    """A sequence of byte strings stored in one array.

    Attributes:
      data: The bytes of all strings, one after the other.
      ends: `[N]`, where each string ends in `data`.
    """

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.data[start : self.ends[index]].tobytes()


class FileIndex:
    """The images of a folder and its subfolders, sorted by path. Symbolic links are followed.

    The index is stored in `root/.index`, or in `folder`, and is rebuilt when a directory has changed.

    Attributes:
      root: The folder that is indexed.
      folder: The folder in which the index is stored.
      paths: `PackedStrings`, relative to `root`, as bytes of the file system.
      labels: `[N]` int32, the number of the top-level directory of each image; -1 for images directly in `root`.
      class_names: The names of the top-level directories with images, sorted, in Unicode's composed form (NFC).
      empty: The names of the top-level directories without images.
      captions: `PackedStrings` from the files of METADATA, empty for images that they do not list; None if there are no
        such files, or before `read_captions`.
      without_text: How many images have no caption file next to them, and the first of them.
      ignored: The number of other files by their extension.
    """

    def __init__(self, root: str, folder: str | None = None):
        self.root, self.folder = root, folder or os.path.join(root, FOLDER)
        header = _current_header(root, self.folder) or _build(root, self.folder)
        self.class_names, self.ignored = tuple(header["class_names"]), header["ignored"]
        self.empty, self.without_text = tuple(header["empty"]), tuple(header["without_text"])
        self._metadata, self._has_captions = header["metadata"], False
        self._map()
        if len(self.labels) != len(self.paths) or (self.labels >= len(self.class_names)).any():
            problem = "has labels that do not match its images"
            raise InputError("path", f"{self.folder} {problem}; remove that folder to rebuild the index")

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Returns the path of an image."""
        path = os.fsdecode(self.paths[index])
        # An index may come with downloaded images, so it must not point to files elsewhere.
        if os.path.isabs(path) or ".." in path.split("/") or "\0" in path:
            problem = f"{self.folder} lists {path!r}, which is not in {self.root}"
            raise InputError("path", f"{problem}; remove that folder to rebuild the index")
        return os.path.join(self.root, path)

    def sizes(self) -> np.ndarray:
        """Returns `[N, 2]` int32, the height and width of each image after its EXIF orientation is applied.

        They are read from the file headers once and then stored in the index. Unreadable images have size 0.
        """

        def write() -> None:
            with ThreadPoolExecutor(THREADS) as pool:
                paths = (self.path(index) for index in range(len(self)))
                _save(self.folder, "sizes", np.array(list(pool.map(_size, paths, chunksize=256)), np.int32))

        self._complete("sizes", write)
        return _load(self.folder, "sizes")

    def read_captions(self) -> None:
        """Reads `captions` from the files of METADATA, if there are any; they are then stored in the index.

        Raises:
          InputError: A file cannot be read.
        """
        if not self._metadata:
            return

        def write() -> None:
            captions = _captions(self.root, self._metadata)
            keys = [_normal(os.fsdecode(self.paths[index])) for index in range(len(self))]
            unknown = captions.keys() - set(keys)
            if unknown:
                first, files_ = min(unknown), " and ".join(self._metadata)
                logger.warning("%s: %d lines are of no image here, such as %r", files_, len(unknown), first)
            _save_strings(self.folder, "captions", [captions.get(key, b"") for key in keys])

        self._complete("captions_ends", write)
        self._has_captions = True
        self._map()

    def __getstate__(self) -> dict[str, Any]:
        # Leave out the arrays, which would be copied to every data worker; a worker maps the files itself.
        mapped = ("paths", "labels", "captions")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def _complete(self, name: str, write: Callable[[], None]) -> None:
        """Calls `write`, in one process at a time, if the index lacks a file."""
        path = os.path.join(self.folder, f"{name}.npy")
        if not os.path.exists(path):
            with _writing(self.folder), locks.wait(self.folder):
                if not os.path.exists(path):
                    write()

    def _map(self) -> None:
        self.paths = _load_strings(self.folder, "paths")
        self.labels = _load(self.folder, "labels")
        self.captions = _load_strings(self.folder, "captions") if self._has_captions else None


def _read_header(folder: str) -> dict[str, Any] | None:
    """Returns the header of a stored index, or None if there is no valid one."""
    try:
        with open(os.path.join(folder, HEADER), encoding="utf-8") as file:
            header = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        return None
    kinds = {"class_names": list, "empty": list, "ignored": dict, "metadata": list, "without_text": list,
             "changed": dict}  # fmt: skip
    return header if all(isinstance(header.get(name), kind) for name, kind in kinds.items()) else None


def _current_header(root: str, folder: str) -> dict[str, Any] | None:
    """Returns the header of a stored index, or None if there is none or a directory has changed since it was built."""
    header = _read_header(folder)
    try:
        for path, time in header["changed"].items() if header else ():
            if os.stat(os.path.join(root, path)).st_mtime_ns != time:
                return None
    except (OSError, ValueError):  # os.stat raises ValueError for a name that contains NUL
        return None
    return header


def _build(root: str, folder: str) -> dict[str, Any]:
    """Builds and stores the index, unless another process does so at the same time. Returns its header."""
    if not os.path.isdir(root):
        raise InputError("path", f"there is no folder {root}")
    try:
        files.make_folder(folder, "index")  # before the walk, because it may change the modification time of `root`
    except InputError as error:
        raise InputError("index", f"{error.problem}; choose another folder for the index") from None
    with _writing(folder), locks.wait(folder):
        return _current_header(root, folder) or _write(root, folder)


def _write(root: str, folder: str) -> dict[str, Any]:
    extensions, _ = image_ops.extensions()
    found, changed, ignored, metadata, without_text = [], {}, {}, [], []
    for path, time, names in _walk(root):
        changed[path] = time
        there = set(names)
        for name in names:
            stem, extension = os.path.splitext(name)
            relative = os.path.join(path, name)
            if extension.lower() in extensions:
                found.append(os.fsencode(relative))
                if there.isdisjoint(stem + ending for ending in CAPTION_EXTENSIONS):
                    without_text.append(relative)
            elif name in METADATA:
                metadata.append(relative)
                changed[relative] = os.stat(os.path.join(root, relative)).st_mtime_ns
            elif extension.lower() not in CAPTION_EXTENSIONS:
                ignored[extension.lower()] = ignored.get(extension.lower(), 0) + 1
    found.sort()
    tops = [_normal(os.fsdecode(path.partition(b"/")[0])) if b"/" in path else None for path in found]
    names = sorted({top for top in tops if top is not None}, key=os.fsencode)
    numbers = {name: number for number, name in enumerate(names)} | {None: -1}
    _save_strings(folder, "paths", found)
    _save(folder, "labels", np.array([numbers[top] for top in tops], np.int32))
    for name in ("sizes", "captions_ends"):
        stale = os.path.join(folder, f"{name}.npy")
        if os.path.exists(stale):
            os.remove(stale)
    directories = {_normal(path) for path in changed if path and "/" not in path} - set(map(_normal, metadata))
    header = {
        "format": FORMAT,
        "class_names": [_printable(name) for name in names],
        "empty": sorted(_printable(name) for name in directories.difference(names)),
        "ignored": ignored,
        "metadata": metadata,
        "without_text": [len(without_text), _printable(min(without_text, default=""))],
        "changed": changed,
    }
    with files.replace(os.path.join(folder, HEADER), any_process=True) as file:
        json.dump(header, file)
    return header


def _walk(root: str, path: str = "", above: frozenset = frozenset()) -> Iterator[tuple[str, int, list[str]]]:
    """Yields the relative path, modification time and file names of each directory.

    A link to a directory that contains it is not followed.
    """
    here = os.path.join(root, path)
    names, directories = [], []
    try:
        status = os.stat(here)
        if (status.st_dev, status.st_ino) in above:
            return
        with os.scandir(here) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is(entry, "dir"):
                    directories.append(entry.name)
                # Leave out pipes and sockets. Broken links are listed, so that reading them reports an error.
                elif _is(entry, "file") or not os.path.exists(entry.path):
                    names.append(entry.name)
    except OSError as error:
        raise InputError("path", f"{here} cannot be read: {error.strerror}; make it readable or remove it") from None
    yield path, status.st_mtime_ns, names
    for name in directories:
        yield from _walk(root, os.path.join(path, name), above | {(status.st_dev, status.st_ino)})


def _is(entry: os.DirEntry, kind: Literal["dir", "file"]) -> bool:
    """Returns whether an entry is a directory or a file; neither, if it is a link to itself."""
    try:
        return entry.is_dir() if kind == "dir" else entry.is_file()
    except OSError:
        return False


def _captions(root: str, metadata: Sequence[str]) -> dict[str, bytes]:
    """Returns the captions of METADATA files by the path of the image, which is relative to the file's folder."""
    found = {}
    for name in metadata:
        path, number = os.path.join(root, name), 1
        if name.endswith(".parquet"):
            raise InputError("captions", f"{path} is not read; write it as metadata.jsonl or metadata.csv")
        try:
            for number, line in (_rows if name.endswith(".csv") else _lines)(path):  # noqa: B007, for the error
                entry = json.loads(line) if isinstance(line, bytes) else line
                image = os.path.join(os.path.dirname(name), entry["file_name"].replace("\\", "/"))
                text = entry["text"] if "text" in entry else entry["caption"]
                if os.path.isabs(image):
                    image = os.path.relpath(image, os.path.abspath(root))
                found[_normal(image)] = text.strip().encode()
        except OSError as error:
            raise InputError("path", f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
            expected = "columns file_name and text" if name.endswith(".csv") else '{"file_name": ..., "text": ...}'
            reason = error if isinstance(error, (ValueError, csv.Error)) else "there is no file_name or text"
            raise InputError("path", f"{path}, line {number}: {reason}; expects {expected} in UTF-8") from None
    return found


def _lines(path: str) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())


def _rows(path: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            yield reader.line_num, row


def _normal(path: str) -> str:
    """Returns a relative path in one spelling: without `./`, and in Unicode's composed form, as macOS uses another."""
    return unicodedata.normalize("NFC", posixpath.normpath(path))


def _printable(name: str) -> str:
    """Returns a name without the surrogates that stand for bytes that are not UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def _size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            # Pillow applies the orientation of TIFF files itself.
            rotated = image.format != "TIFF" and image_ops.orientation(image) >= 5
            return (image.width, image.height) if rotated else (image.height, image.width)
    except Exception:  # reading the image itself later reports what is wrong
        return 0, 0


@contextlib.contextmanager
def _writing(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        problem = f"{folder} cannot be written: {error.strerror}; choose another folder for the index"
        raise InputError("index", problem) from error


def _save(folder: str, name: str, array: np.ndarray) -> None:
    # Each process of a job may have its own disk.
    with files.replace(os.path.join(folder, f"{name}.npy"), "wb", any_process=True) as file:
        np.save(file, array)


def _load(folder: str, name: str) -> np.ndarray:
    path = os.path.join(folder, f"{name}.npy")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError("path", f"{path} cannot be read: {error}; remove {folder} to rebuild the index") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise InputError("path", f"{path} is not part of an index; remove {folder} to rebuild the index")
    return array


def _save_strings(folder: str, name: str, strings: Iterable[bytes]) -> None:
    strings = list(strings)
    _save(folder, name, np.frombuffer(b"".join(strings), np.uint8))
    _save(folder, f"{name}_ends", np.cumsum([len(string) for string in strings], dtype=np.uint64))


def _load_strings(folder: str, name: str) -> PackedStrings:
    return PackedStrings(_load(folder, name), _load(folder, f"{name}_ends"))
