"""The index of a folder's images: built by one walk over the folder, stored on disk and memory-mapped from there.

It takes a few tens of bytes of memory per image.
"""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import ExifTags, Image

from diffusion.core import files
from diffusion.core.types import InputError

FOLDER = ".index"  # inside the folder that is indexed
HEADER = "index.json"
FORMAT = 1
METADATA = "metadata.jsonl"
THREADS = 8  # reading the sizes of images mostly waits for the disk


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
      class_names: The names of the top-level directories, sorted.
      captions: `PackedStrings` from `metadata.jsonl`, empty for images it does not list; None if there is no such file.
      ignored: The number of other files by their extension.
    """

    def __init__(self, root: str, folder: str | None = None):
        self.root, self.folder = root, folder or os.path.join(root, FOLDER)
        header = _read_header(self.folder)
        if header is None or not _is_current(root, header):
            header = _build(root, self.folder)
        self.class_names, self.ignored = tuple(header["class_names"]), header["ignored"]
        self._has_captions = header["captions"]
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
        file = os.path.join(self.folder, "sizes.npy")
        if not os.path.exists(file):
            with ThreadPoolExecutor(THREADS) as pool:
                paths = (self.path(index) for index in range(len(self)))
                _save(self.folder, "sizes", np.array(list(pool.map(_size, paths, chunksize=256)), np.int32))
        return _load(self.folder, "sizes")

    def __getstate__(self) -> dict[str, Any]:
        # Leave out the arrays, which would be copied to every data worker; a worker maps the files itself.
        mapped = ("paths", "labels", "captions")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

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
    kinds = {"class_names": list, "ignored": dict, "captions": bool, "changed": dict}
    return header if all(isinstance(header.get(name), kind) for name, kind in kinds.items()) else None


def _is_current(root: str, header: dict[str, Any]) -> bool:
    """Returns whether no directory has changed since the index was built."""
    try:
        return all(os.stat(os.path.join(root, path)).st_mtime_ns == time for path, time in header["changed"].items())
    except (OSError, ValueError):  # os.stat raises ValueError for a name that contains NUL
        return False


def _build(root: str, folder: str) -> dict[str, Any]:
    """Builds and stores the index. Returns its header."""
    if not os.path.isdir(root):
        raise InputError("path", f"there is no folder {root}")
    try:
        files.make_folder(folder, "index")  # before the walk, because it may change the modification time of `root`
    except InputError as error:
        raise InputError("index", f"{error.problem}; choose another folder for the index") from None
    extensions = Image.registered_extensions()
    found, changed, ignored = [], {}, {}
    for path, time, names in _walk(root):
        changed[path] = time
        for name in names:
            extension = os.path.splitext(name)[1].lower()
            if extension in extensions:
                found.append(os.fsencode(os.path.join(path, name)))
            elif name != METADATA and extension != ".txt":
                ignored[extension] = ignored.get(extension, 0) + 1
    found.sort()
    tops = [path.partition(b"/")[0] if b"/" in path else None for path in found]
    names = sorted({top for top in tops if top is not None})
    numbers = {name: number for number, name in enumerate(names)} | {None: -1}
    metadata = os.path.join(root, METADATA)
    if os.path.exists(metadata):
        changed[METADATA] = os.stat(metadata).st_mtime_ns
        _save_strings(folder, "captions", _captions(metadata, found))
    _save_strings(folder, "paths", found)
    _save(folder, "labels", np.array([numbers[top] for top in tops], np.int32))
    sizes = os.path.join(folder, "sizes.npy")
    if os.path.exists(sizes):
        os.remove(sizes)
    header = {
        "format": FORMAT,
        "class_names": [os.fsdecode(name).encode("utf-8", "replace").decode() for name in names],
        "ignored": ignored,
        "captions": os.path.exists(metadata),
        "changed": changed,
    }
    with files.replace(os.path.join(folder, HEADER)) as file:
        json.dump(header, file)
    return header


def _walk(root: str, path: str = "", above: frozenset = frozenset()) -> Iterator[tuple[str, int, list[str]]]:
    """Yields the relative path, modification time and file names of each directory.

    A link to a directory that contains it is not followed.
    """
    here = os.path.join(root, path)
    status = os.stat(here)
    if (status.st_dev, status.st_ino) in above:
        return
    names, directories = [], []
    with os.scandir(here) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                directories.append(entry.name)
            # Leave out pipes and sockets. Broken links are listed, so that reading them reports an error.
            elif entry.is_file() or not os.path.exists(entry.path):
                names.append(entry.name)
    yield path, status.st_mtime_ns, names
    for name in directories:
        yield from _walk(root, os.path.join(path, name), above | {(status.st_dev, status.st_ino)})


def _captions(metadata: str, paths: list[bytes]) -> list[bytes]:
    """Reads lines `{"file_name": ..., "text": ...}` from a file. Returns the captions in the order of `paths`."""
    captions = {}
    with open(metadata, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                captions[os.fsencode(entry["file_name"])] = entry["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problem = f'{metadata}, line {number}: {error}; expects {{"file_name": ..., "text": ...}} in UTF-8'
                raise InputError("path", problem) from None
    return [captions.get(path, b"") for path in paths]


def _size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            rotated = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if rotated else (image.height, image.width)
    except Exception:  # reading the image itself later reports what is wrong
        return 0, 0


def _save(folder: str, name: str, array: np.ndarray) -> None:
    with files.replace(os.path.join(folder, f"{name}.npy"), "wb") as file:
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
