"""Reads and writes files of tensors: safetensors, and, to be read alone, what `torch.save` writes. Neither torch nor
anything in a file is executed.

A file of torch holds a pickle, that is, a program that builds the saved object and may call any function by its name.
`_interpret` follows the instructions that dicts of tensors consist of. It calls only the functions in `_GLOBALS`, all
of which are defined here, and refuses a file that would call another. The numbers of the tensors follow the pickle:

    torch >= 1.6   a zip archive of NAME/data.pkl and, for each storage, NAME/data/KEY, uncompressed
    earlier        five pickles (a magic number, a version, properties of the machine, the object, the keys of its
                   storages), and for each key the number of elements as int64 and the elements

A safetensors file consists of a header, JSON with the place of each tensor, and the numbers. The arrays of every format
are views of the file, which the system reads when they are used.
"""

import concurrent.futures
import hashlib
import io
import json
import math
import mmap
import os
import pickletools
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from diffusion.core import files
from diffusion.core.types import InputError

POINTER = b"version https://git-lfs"  # the text that Git LFS leaves in place of a file that was not downloaded
ZIP, PICKLE = b"PK\x03\x04", b"\x80"
MAGIC = 0x1950A86A20F9469CFC6C


class _Storage(NamedTuple):
    key: str
    dtype: np.dtype


class _Tensor(NamedTuple):
    """A tensor whose numbers have not been read. Offset and strides count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype


class _Unknown(NamedTuple):
    """A global that is not in `_GLOBALS`. It may be referred to, as by the callbacks of a trainer, but not called."""

    name: str


def _nothing(*args: Any) -> None:
    """Stands for numbers of NumPy, which checkpoints hold next to their tensors."""


_DTYPES = {
    name: np.dtype(getattr(jnp, f"{name}_" if name == "bool" else name))
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16",
                 "int8", "uint64", "uint32", "uint16", "uint8", "bool")
}  # fmt: skip
_SAFETENSORS = {
    "F64": _DTYPES["float64"], "F32": _DTYPES["float32"], "F16": _DTYPES["float16"], "BF16": _DTYPES["bfloat16"],
    "F8_E4M3": _DTYPES["float8_e4m3fn"], "F8_E5M2": _DTYPES["float8_e5m2"], "BOOL": _DTYPES["bool"],
    **{f"{sign}{bits}": np.dtype(f"{kind}{bits}") for sign, kind in (("I", "int"), ("U", "uint"))
       for bits in (8, 16, 32, 64)},
}  # fmt: skip
_STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "Long": "int64", "Int": "int32",
    "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool",
}  # fmt: skip
_GLOBALS = {
    "collections.OrderedDict": dict,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": lambda *place: _Tensor(*place, place[0].dtype),
    "torch._utils._rebuild_tensor_v2": lambda *args: _Tensor(*args[:-2], args[0].dtype),
    "torch._utils._rebuild_tensor_v3": lambda *args: _Tensor(*args[:-3], args[-1]),
    "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
    **{f"torch.{name}": dtype for name, dtype in _DTYPES.items()},
    **{f"torch.{name}Storage": _DTYPES[dtype] for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": _DTYPES["uint8"],
    "numpy.core.multiarray.scalar": _nothing,
    "numpy._core.multiarray.scalar": _nothing,
    "numpy.dtype": _nothing,
    "_codecs.encode": _nothing,
}
_LITERALS = {"INT", "LONG", "FLOAT", "STRING", "UNICODE", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
             "BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
             "SHORT_BINBYTES", "BINBYTES8"}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_CONTAINERS = {"EMPTY_DICT": dict, "EMPTY_LIST": list}


class _Forbidden(Exception):
    """The pickle would call a global that is not in `_GLOBALS`."""


def read(path: str, field: str) -> dict[str, np.ndarray]:
    """Reads the tensors of a file by name, each with the dtype that it is stored with.

    Args:
      path: A safetensors file, or a file of `torch.save` (`.pt`, `.pth`, `.bin`, `.ckpt`) with a dict of tensors, or
        with such a dict as its entry `state_dict`. Entries that are no tensors are left out. The content decides, not
        the name.
      field: Named by errors.

    Raises:
      InputError: The file cannot be read, holds no tensors by name, is a pointer of Git LFS, or would call a function.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(POINTER))
            if head == POINTER:
                problem = f"{path} is a pointer of Git LFS, not the weights; run `git lfs pull` where it was cloned"
                raise InputError(field, problem)
            # A safetensors file starts with the length of its header, of which the first byte may be that of a pickle.
            if is_safetensors := head[:4] != ZIP and (head[:1] != PICKLE or head[8:9] == b"{"):
                with safetensors.safe_open(path, "np"):
                    pass  # checks the header
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if is_safetensors:
                return _safetensors(data)
        content, numbers = _open_archive(path, data) if head[:4] == ZIP else _open_pickles(data)
        return _tensors(content, numbers)
    except InputError:
        raise
    except _Forbidden as error:
        problem = f"{path} would call {error} when it is loaded, which tensors do not need; nothing of it was run. If"
        raise InputError(field, f"{problem} you trust it, save its tensors as safetensors with torch") from None
    except OSError as error:
        raise InputError(field, f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged file can fail at any place of a pickle or an archive
        problem = f"{path} is damaged, or neither safetensors nor a file of torch.save with tensors by name"
        raise InputError(field, f"{problem}: {type(error).__name__}: {error}") from None


def metadata(path: str) -> dict[str, str]:
    """Returns the metadata of a safetensors file, which `read` has read."""
    with safetensors.safe_open(path, "np") as file:
        return file.metadata() or {}


def write(path: str, tensors: Mapping[str, np.ndarray], dtype: str | None, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file. The tensors are converted one after the other.

    Args:
      path: The file, which is replaced when it is complete.
      tensors: The tensors by name.
      dtype: The dtype of all tensors in the file, such as `float16`. None: each keeps its own.
      metadata: Texts by name.

    Raises:
      InputError: A number is not finite, or is too large for the dtype.
    """
    header, end = {"__metadata__": dict(metadata)}, 0
    codes = {known: code for code, known in _SAFETENSORS.items()}
    targets = {name: tensor.dtype if dtype is None else _DTYPES[dtype] for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        start, end = end, end + tensor.size * targets[name].itemsize
        header[name] = {"dtype": codes[targets[name]], "shape": tensor.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with files.replace(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            with np.errstate(over="ignore"):
                array = np.ascontiguousarray(tensor, targets[name])
            if not np.isfinite(array).all():
                check_finite(name, tensor)
                raise InputError("dtype", f"{dtype} has no number as large as one in {name}; use bfloat16 or float32")
            file.write(array.reshape(-1).view(np.uint8))


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """Returns the SHA-256 of the names, dtypes, shapes and numbers of tensors, in hexadecimal.

    It does not depend on how they are distributed over files. A thread per core reads one tensor at a time.

    Raises:
      InputError: A number is not finite.
    """

    def line(name: str) -> str:
        tensor = tensors[name]
        check_finite(name, tensor)
        content = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)  # bfloat16 has no buffer
        return f"{name} {tensor.dtype} {tensor.shape} {hashlib.sha256(content).hexdigest()}\n"

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = pool.map(line, sorted(tensors))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def to_float32(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts tensors to float32. Raises InputError if a number is not finite."""
    found = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    for name, tensor in found.items():
        check_finite(name, tensor)
    return found


def check_finite(name: str, tensor: np.ndarray) -> None:
    """Raises InputError if a number of a tensor is not finite."""
    bad = tensor.size - np.count_nonzero(np.isfinite(tensor))
    if bad:
        raise InputError(f"tensors.{name}", f"has {bad} of {tensor.size} values that are NaN or infinite; the "
                         "training diverged or the file is damaged")  # fmt: skip


def _safetensors(data: mmap.mmap) -> dict[str, np.ndarray]:
    """Returns the tensors of a safetensors file whose header is valid, as views of its bytes."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {
        name: np.ndarray(entry["shape"], _SAFETENSORS[entry["dtype"]], data, start + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def _tensors(content: Any, numbers: Callable[[str], memoryview]) -> dict[str, np.ndarray]:
    """Returns the tensors of a dict, or of its entry `state_dict`, given the bytes of each storage."""
    if isinstance(content, dict):
        content = content.get("state_dict", content)
    items = content.items() if isinstance(content, dict) else ()
    found = {key: value for key, value in items if isinstance(key, str) and isinstance(value, _Tensor)}
    if not found:
        raise ValueError("it has no tensor by name")
    return {key: _array(value, numbers(value.storage.key)) for key, value in found.items()}


def _array(tensor: _Tensor, data: memoryview) -> np.ndarray:
    """Returns a tensor as a view of the bytes of its storage. NumPy checks that it lies within these."""
    _, offset, shape, strides, dtype = tensor
    size, step = math.prod(shape), dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    if size * step > len(data):
        raise ValueError(f"a tensor of shape {shape} has {len(data)} bytes")
    return np.ndarray(shape, dtype, data, offset * step, tuple(stride * step for stride in strides))


def _open_archive(path: str, data: mmap.mmap) -> tuple[Any, Callable[[str], memoryview]]:
    """Returns the object in an archive of torch >= 1.6, and a function from the key of a storage to its bytes."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
    folders = [name.removesuffix("data.pkl") for name in members if re.fullmatch(r"[^/]+/data\.pkl", name)]
    if len(folders) != 1:
        raise ValueError("the archive has no data.pkl")

    def member(name: str) -> memoryview:
        info = members[folders[0] + name]
        lengths = struct.unpack_from("<HH", data, info.header_offset + 26)  # of the name and of another field
        start = info.header_offset + 30 + sum(lengths)
        if info.compress_type != zipfile.ZIP_STORED or start + info.file_size > len(data):
            raise ValueError(f"{info.filename} is compressed or incomplete")
        return memoryview(data)[start : start + info.file_size]

    if folders[0] + "byteorder" in members:
        _check_order(bytes(member("byteorder")) == b"little")
    return _interpret(io.BytesIO(member("data.pkl")))[0], lambda key: member(f"data/{key}")


def _open_pickles(data: mmap.mmap) -> tuple[Any, Callable[[str], memoryview]]:
    """Returns the object in a file of torch before 1.6, and a function from the key of a storage to its bytes."""
    if _interpret(data)[0] != MAGIC:
        raise ValueError("torch.save did not write this pickle")
    (_, _), (machine, _), (content, dtypes), (keys, _) = (_interpret(data) for _ in range(4))
    _check_order(machine["little_endian"])
    places, start = {}, data.tell()
    for key in keys:
        size = struct.unpack_from("<q", data, start)[0] * dtypes[key].itemsize
        places[key] = memoryview(data)[start + 8 : start + 8 + size]
        start += 8 + size
    return content, places.__getitem__


def _check_order(little_endian: bool) -> None:
    if not little_endian:
        raise ValueError("its numbers are big-endian")


def _interpret(file: Any) -> tuple[Any, dict[str, np.dtype]]:
    """Interprets one pickle from the position of a file on.

    Returns:
      The object, with a `_Tensor` for each tensor, and the dtypes of the storages by key.
    """
    stack, marks, memo, storages = [], [], {}, {}

    def above_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, arg, _ in pickletools.genops(file):
        name = opcode.name
        if name in _LITERALS:
            stack.append(arg)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _CONTAINERS:
            stack.append(_CONTAINERS[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[arg] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[arg])
        elif name == "MARK":
            marks.append(len(stack))
        elif name in ("TUPLE", "LIST"):
            items = above_mark()
            stack.append(items if name == "LIST" else tuple(items))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            stack[-int(name[-1]) :] = [tuple(stack[-int(name[-1]) :])]
        elif name in ("APPEND", "APPENDS"):
            items = above_mark() if name == "APPENDS" else [stack.pop()]
            list.extend(stack[-1], items)
        elif name in ("SETITEM", "SETITEMS", "DICT"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else above_mark()
            if name == "DICT":
                stack.append({})
            dict.update(stack[-1], zip(items[::2], items[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            found = arg.replace(" ", ".") if name == "GLOBAL" else f"{stack.pop(-2)}.{stack.pop()}"
            stack.append(_GLOBALS.get(found, _Unknown(found)))
        elif name == "BINPERSID":
            _, dtype, key, _, _, *view = stack.pop()
            if any(view) or not isinstance(dtype, np.dtype):
                raise ValueError(f"the storage {key} is a view or of an unknown type")
            storages.setdefault(key, dtype)
            stack.append(_Storage(key, dtype))
        elif name in ("REDUCE", "NEWOBJ"):
            args, function = stack.pop(), stack.pop()
            if isinstance(function, _Unknown):
                raise _Forbidden(function.name)
            stack.append(function(*args))
        elif name == "INST":
            raise _Forbidden(arg.replace(" ", "."))
        elif name == "BUILD":  # attributes of an object, such as `_metadata` of a state dict
            stack.pop()
        elif name == "STOP":
            return stack.pop(), storages
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"the instruction {name} is in no dict of tensors")
    raise EOFError("the pickle has no end")
