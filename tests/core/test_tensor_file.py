"""Files of tensors: the formats, what is refused, and that nothing in a file is run. With torch installed (`make
parity`), the files that it writes are read as it reads them."""

import os
import pickle
import struct
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffusion.core import tensor_file
from tests.refusals import refused

VALUES = np.arange(24, dtype=np.float32)
DATA = VALUES.tobytes()
# Places in the storage: all of it, a part, a transposed matrix, a number, and nothing.
PLACES = {"all": (0, (2, 3, 4), (12, 4, 1)), "part": (5, (3,), (2,)), "turned": (12, (4, 3), (1, 4)),
          "number": (23, (), ()), "none": (24, (0, 3), (3, 1))}  # fmt: skip


def plain(value):
    """Returns the instructions that push a value of Python, as torch.save writes them (protocol 2)."""
    return pickle.dumps(value, 2)[2:-1]


def storage(key="0", kind=b"Float", rest=b"", numel=24):
    return (
        b"("
        + plain("storage")
        + b"ctorch\n%bStorage\n" % kind
        + plain(key)
        + plain("cpu")
        + plain(numel)
        + rest
        + b"tQ"
    )


def tensor(place, stored, old=False):
    version, rest = (b"", b"") if old else (b"_v2", b"\x89ccollections\nOrderedDict\n)R")
    return b"ctorch._utils\n_rebuild_tensor%b\n(" % version + stored + b"".join(map(plain, place)) + rest + b"tR"


def dict_of(entries):
    return b"ccollections\nOrderedDict\n)R(" + b"".join(plain(name) + value for name, value in entries.items()) + b"u"


def archive(path, content, order="little", compression=zipfile.ZIP_STORED, data=DATA):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, member in (("data.pkl", b"\x80\x02" + content + b"."), ("byteorder", order), ("data/0", data)):
            file.writestr(f"archive/{name}", member)
    return str(path)


def pickles(path, content, data=DATA, little_endian=True, keys=("0",)):
    heads = [tensor_file.MAGIC, 1001, {"little_endian": little_endian}]
    parts = [*map(plain, heads), content, plain(list(keys))]
    size = struct.pack("<q", len(data) // 4)
    path.write_bytes(b"".join(b"\x80\x02" + part + b"." for part in parts) + size + data)
    return str(path)


def read(path):
    return tensor_file.read(path, "field")


@pytest.mark.parametrize("form", ["archive", "pickles", "oldest"])
def test_tensors_are_views_of_their_storage(form, tmp_path):
    old = form == "oldest"
    stored = storage(rest=b"" if form == "archive" else b"N")
    content = dict_of({name: tensor(place, stored, old) for name, place in PLACES.items()} | {"epoch": plain(3)})
    found = read({"archive": archive}.get(form, pickles)(tmp_path / "a.pt", content))
    assert found.keys() == PLACES.keys()
    for name, (offset, shape, strides) in PLACES.items():
        index = offset + sum(np.arange(n).reshape(-1, *[1] * (len(shape) - 1 - axis)) * stride
                             for axis, (n, stride) in enumerate(zip(shape, strides, strict=True)))  # fmt: skip
        expected = VALUES[np.broadcast_to(index, shape)] if 0 not in shape else np.empty(shape, np.float32)
        np.testing.assert_array_equal(found[name], expected)
        assert found[name].shape == shape and found[name].dtype == np.float32


def test_a_state_dict_inside_a_checkpoint(tmp_path):
    """It is found next to numbers of NumPy and classes that are named but not called, as Lightning saves them."""
    scalar = (
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(X\x02\x00\x00\x00f8\x89\x88tR(K\x03NtbX\x01\x00\x00\x00atR"
    )
    callbacks = b"}(clightning.callbacks\nModelCheckpoint\n}u"
    inner = dict_of({"w": tensor(PLACES["all"], storage())})
    path = archive(tmp_path / "a.ckpt", b"}(" + plain("best") + scalar + plain("callbacks") + callbacks
                   + plain("state_dict") + inner + b"u")  # fmt: skip
    np.testing.assert_array_equal(read(path)["w"], VALUES.reshape(2, 3, 4))


def test_safetensors(tmp_path):
    for dtype in (np.float32, np.float16, jnp.bfloat16, np.int64):
        safetensors.numpy.save_file({"a": VALUES.astype(dtype)}, tmp_path / "a.pth")  # by content, not by name
        found = read(str(tmp_path / "a.pth"))["a"]
        np.testing.assert_array_equal(found, VALUES.astype(dtype))
        assert found.dtype == dtype and not found.flags.owndata  # it is a view of the file
    for length in range(256):  # among them, headers whose length starts with the first byte of a pickle
        safetensors.numpy.save_file({"a": VALUES}, tmp_path / "a", metadata={"a": "a" * length})
        assert read(str(tmp_path / "a")).keys() == {"a"}


class Trap:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Instance:
    """Its pickle has the instruction NEWOBJ."""


@pytest.mark.parametrize("form", ["archive", "pickles", "inside", "bare"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_no_function_is_called(form, protocol, tmp_path):
    """The error names the file and what would have been called."""
    sprung = tmp_path / "sprung"
    traps = {"posix.system": Trap(os.system, f"touch {sprung}"), "builtins.exec": Trap(exec, f"open('{sprung}', 'w')"),
             f"{__name__}.Instance": Instance()}  # fmt: skip
    for name, trap in traps.items():
        content = pickle.dumps(trap, protocol)[2:-1]
        content = dict_of({"w": tensor(PLACES["all"], storage()), "trap": content}) if form == "inside" else content
        path = tmp_path / "a.pt"
        if form == "bare":
            path.write_bytes(pickle.dumps(trap, protocol))
        else:
            (pickles if form == "pickles" else archive)(path, content)
        with refused("field") as caught:
            read(str(path))
        expected = name.replace("builtins", "__builtin__") if protocol == 2 else name
        assert expected in str(caught.value) and str(path) in str(caught.value) and not sprung.exists()


# Contents that are no tensors, or whose tensors exceed their storage, and instructions without operands.
DAMAGED = {
    "no tensors": plain({"a": 1}), "a list": plain([1, 2]), "a number": plain(3), "no names": b"}(" + plain(1)
    + tensor(PLACES["all"], storage()) + b"u", "a view": dict_of({"a": tensor(PLACES["all"], storage(rest=b"K\x01"))}),
    "an unknown type": dict_of({"a": tensor(PLACES["all"], storage(kind=b"Odd"))}),
    "another storage": dict_of({"a": tensor(PLACES["all"], storage(key="1"))}),
    **{f"the place {place}": dict_of({"a": tensor(place, storage())}) for place in (
        (0, (25,), (1,)), (1, (24,), (1,)), (0, (2, 3), (24, 1)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (2,), ()),
        (0, (10**12,), (0,)), (2**62, (1,), (1,)), (0, (1.0,), (1,)), (0, (-2,), (1,)), (0, ("a",), (1,)), (0, 2, 1),
        (0, (2**70,), (1,)), (0, (0, 2**70), (1, 1)),
    )},
    **{f"the instruction {code}": code for code in (
        b"R", b"u", b"a", b"t", b"Q", b"0", b"h\x05", b"q\x00", b"b", b"}K\x01a", b"]K\x01K\x02s", b"](K\x01u", b"s",
        b"\x87", b"\x93", b"\x82\x01", b"(ios\nsystem\n", b"(cos\nsystem\no", b"K\x01K\x02R", b"K\x01Q",
        b"\x8e" + b"\xff" * 8, b"X\xff\xff\xff\x7fa", b"}]]s", b"\x96" + b"\x00" * 8, b"Psystem\n", b"\xff",
    )},
}  # fmt: skip


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_pickle_is_refused(content, tmp_path):
    for write in (archive, pickles):
        with refused("field") as caught:
            read(write(tmp_path / "a.pt", content))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [archive, pickles])
def test_a_truncated_file_is_refused(write, tmp_path):
    path = tmp_path / "a.pt"
    write(path, dict_of({name: tensor(place, storage()) for name, place in PLACES.items()}))
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 7), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with refused("field") as caught:
            read(str(path))
        assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    content = dict_of({"w": tensor(PLACES["all"], storage())})
    files = [archive(tmp_path / "a", content, order="big"), pickles(tmp_path / "b", content, little_endian=False),
             archive(tmp_path / "c", content, compression=zipfile.ZIP_DEFLATED),
             pickles(tmp_path / "d", content, keys=("1",)), archive(tmp_path / "e", content, data=b"")]  # fmt: skip
    for name, data in {"text": b"text", "pointer": b"version https://git-lfs.github.com/spec/v1\n"}.items():
        (tmp_path / name).write_bytes(data)
        files.append(str(tmp_path / name))
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as file:
        file.writestr("a/b.txt", "text")
    for path in (*files, str(tmp_path / "other.zip"), str(tmp_path), str(tmp_path / "absent"), "a\0b"):
        with refused("field") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.peers
@pytest.mark.parametrize("archive", [True, False], ids=["archive", "pickles"])
def test_files_of_torch(archive, tmp_path):
    import torch

    torch.manual_seed(0)
    whole = 100 * torch.randn(3, 4, 5)
    names = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16",
             "int8", "uint64", "uint32", "uint16", "uint8", "bool")  # fmt: skip
    tensors = {name: whole.to(getattr(torch, name)) for name in names}
    tensors |= {"turned": whole.permute(2, 0, 1), "part": whole[1:, ::2, 3:], "shared": whole, "number": whole[1, 2, 3],
                "empty": whole[:0], "parameter": torch.nn.Parameter(whole[0])}  # fmt: skip
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    objects = {
        "tensors": tensors, "module": module.state_dict(),
        "nested": {"state_dict": tensors, "epoch": 3, "best": np.float64(0.5), "size": whole.shape, "a": (0.1, [None])},
    }  # fmt: skip
    for protocol in (2, 4):
        for name, saved in objects.items():
            path = str(tmp_path / "file.pt")
            torch.save(saved, path, _use_new_zipfile_serialization=archive, pickle_protocol=protocol)
            found = read(path)
            expected = saved.get("state_dict", saved)
            assert found.keys() == expected.keys(), name
            for key, value in expected.items():
                bits = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
                np.testing.assert_array_equal(np.ascontiguousarray(found[key]).reshape(-1).view(np.uint8), bits)
                assert found[key].shape == tuple(value.shape) and found[key].dtype.name == str(value.dtype)[6:]


@pytest.mark.peers
def test_safetensors_of_torch(tmp_path):
    import safetensors.torch
    import torch

    whole = 100 * torch.randn(3, 4, 5)
    names = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16",
             "int8", "uint64", "uint32", "uint16", "uint8", "bool")  # fmt: skip
    tensors = {name: whole.to(getattr(torch, name)) for name in names} | {"number": whole[0, 0, 0], "empty": whole[:0]}
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "a")
    found = read(str(tmp_path / "a"))
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        bits = value.contiguous().view(-1).view(torch.uint8).numpy()
        np.testing.assert_array_equal(np.ascontiguousarray(found[name]).reshape(-1).view(np.uint8), bits)
        assert found[name].shape == tuple(value.shape) and found[name].dtype.name == str(value.dtype)[6:]


@pytest.mark.peers
def test_objects_of_torch_are_refused(tmp_path):
    import torch

    numbers = torch.zeros(2, dtype=torch.complex64)
    objects = {"model": torch.nn.Linear(2, 2), "tensor": torch.zeros(2), "sparse": {"a": torch.eye(2).to_sparse()},
               "complex": {"a": numbers}, "conjugate": {"a": numbers.conj().imag}}  # fmt: skip
    for name, saved in objects.items():
        torch.save(saved, tmp_path / name)
        with refused("field"):
            read(str(tmp_path / name))
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "script.pt")
    with refused("field"):
        read(str(tmp_path / "script.pt"))
