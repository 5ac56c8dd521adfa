"""The kept list of a folder's images: walked once, then mapped into memory, a few tens of bytes an image."""

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
THREADS = 8  # that read the sizes of images, which waits for the disk


class Strings:
    """Many byte strings in one array: `strings[i]`."""

    def __init__(self, data: np.ndarray, ends: np.ndarray):
        self.data, self.ends = data, ends

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> bytes:
        start = self.ends[index - 1] if index else 0
        return self.data[start : self.ends[index]].tobytes()


class FileIndex:
    """The images of a folder and of all below it, in the order of their names.

    It is kept in `.index` in the folder, and made anew when a directory has changed since. Links are followed.

    Attributes:
      root: the folder.
      paths: `Strings`, relative to it, as the file system has them.
      labels: `[N]` int32, the number of the top directory each is in; -1 for those in the folder itself.
      class_names: of the top directories, sorted.
      captions: `Strings` from `metadata.jsonl`, empty where it has none, or None without the file.
      ignored: how many other files there are, by their extension.
    """

    def __init__(self, root: str, where: str | None = None):
        self.root, self.where = root, where or os.path.join(root, FOLDER)
        header = _kept(self.where)
        if header is None or not _fresh(root, header):
            header = _build(root, self.where)
        self.class_names, self.ignored = tuple(header["class_names"]), header["ignored"]
        self._captions = header["captions"]
        self._map()
        if len(self.labels) != len(self.paths) or (self.labels >= len(self.class_names)).any():
            raise InputError("path", f"{self.where} has other labels than images; remove it, and it is made anew")

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        path = os.fsdecode(self.paths[index])
        if os.path.isabs(path) or ".." in path.split("/") or "\0" in path:  # a list may have come with the images
            raise InputError("path", f"{self.where} lists {path!r}, which is not in {self.root}; remove that folder")
        return os.path.join(self.root, path)

    def sizes(self) -> np.ndarray:
        """`[N, 2]` int32, height and width of the images as they are shown, from the heads of the files; 0 where that
        cannot be read. They are kept once they are known."""
        file = os.path.join(self.where, "sizes.npy")
        if not os.path.exists(file):
            with ThreadPoolExecutor(THREADS) as pool:
                paths = (self.path(index) for index in range(len(self)))
                _save(self.where, "sizes", np.array(list(pool.map(_size, paths, chunksize=256)), np.int32))
        return _load(self.where, "sizes")

    def __getstate__(self) -> dict[str, Any]:
        # A data worker maps the files itself; the arrays would be copied to it.
        mapped = ("paths", "labels", "captions")
        return {name: value for name, value in self.__dict__.items() if name not in mapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def _map(self) -> None:
        self.paths = _strings(self.where, "paths")
        self.labels = _load(self.where, "labels")
        self.captions = _strings(self.where, "captions") if self._captions else None


def _kept(where: str) -> dict[str, Any] | None:
    try:
        with open(os.path.join(where, HEADER), encoding="utf-8") as file:
            header = json.load(file)
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        return None
    kinds = {"class_names": list, "ignored": dict, "captions": bool, "changed": dict}
    return header if all(isinstance(header.get(name), kind) for name, kind in kinds.items()) else None


def _fresh(root: str, header: dict[str, Any]) -> bool:
    try:
        return all(os.stat(os.path.join(root, path)).st_mtime_ns == time for path, time in header["changed"].items())
    except (OSError, ValueError):  # a name with a NUL
        return False


def _build(root: str, where: str) -> dict[str, Any]:
    if not os.path.isdir(root):
        raise InputError("path", f"there is no folder {root}")
    try:
        files.make_folder(where, "index")  # first, for it changes the folder's own time
    except InputError as error:
        raise InputError("index", f"{error.problem}; give another folder to keep the list of images in") from None
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
        _save_strings(where, "captions", _captions(metadata, found))
    _save_strings(where, "paths", found)
    _save(where, "labels", np.array([numbers[top] for top in tops], np.int32))
    sizes = os.path.join(where, "sizes.npy")
    if os.path.exists(sizes):
        os.remove(sizes)
    header = {
        "format": FORMAT,
        "class_names": [os.fsdecode(name).encode("utf-8", "replace").decode() for name in names],
        "ignored": ignored,
        "captions": os.path.exists(metadata),
        "changed": changed,
    }
    with files.replace(os.path.join(where, HEADER)) as file:
        json.dump(header, file)
    return header


def _walk(root: str, path: str = "", above: frozenset = frozenset()) -> Iterator[tuple[str, int, list[str]]]:
    """Each directory's relative path, time of its last change and names of files; a link to a directory that it is in
    is not followed."""
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
            elif entry.is_file() or not os.path.exists(entry.path):  # no pipes and sockets; broken links are named
                names.append(entry.name)
    yield path, status.st_mtime_ns, names
    for name in directories:
        yield from _walk(root, os.path.join(path, name), above | {(status.st_dev, status.st_ino)})


def _captions(metadata: str, paths: list[bytes]) -> list[bytes]:
    """Of `{"file_name": ..., "text": ...}` a line, in the order of the paths."""
    captions = {}
    with open(metadata, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                captions[os.fsencode(entry["file_name"])] = entry["text"].encode()
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                problem = f'{metadata}, line {number}: {error}; write {{"file_name": ..., "text": ...}} in UTF-8'
                raise InputError("path", problem) from None
    return [captions.get(path, b"") for path in paths]


def _size(path: str) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except Exception:  # whoever reads the image itself says what is wrong
        return 0, 0


def _save(where: str, name: str, array: np.ndarray) -> None:
    with files.replace(os.path.join(where, f"{name}.npy"), "wb") as file:
        np.save(file, array)


def _load(where: str, name: str) -> np.ndarray:
    path = os.path.join(where, f"{name}.npy")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError("path", f"{path} cannot be read: {error}; remove {where}, and it is made anew") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        raise InputError("path", f"{path} is no list of ours; remove {where}, and it is made anew")
    return array


def _save_strings(where: str, name: str, strings: Iterable[bytes]) -> None:
    strings = list(strings)
    _save(where, name, np.frombuffer(b"".join(strings), np.uint8))
    _save(where, f"{name}_ends", np.cumsum([len(string) for string in strings], dtype=np.uint64))


def _strings(where: str, name: str) -> Strings:
    return Strings(_load(where, name), _load(where, f"{name}_ends"))
