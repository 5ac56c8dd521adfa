"""Files from other sources are data: nothing in them is executed, and no name in them leads out of its folder.

Configs are Python and are executed; see docs/reliability.md.
"""

import ast
import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from diffusion.core import model_folder
from diffusion.core.build import build, call, find
from diffusion.training.ema import make_ema
from tests.refusals import refused

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(path for top in ("diffusion", "experiments", "launch") for path in (ROOT / top).rglob("*.py"))

# Modules whose readers execute what they read, calls that execute text, and calls that do so without a keyword.
MODULES = ("pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "yaml")
CALLS = ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load", "pandas.read_pickle",
         "runpy.run_path", "runpy.run_module", "tarfile.open", "shutil.unpack_archive")  # fmt: skip
KEYWORDS = {"numpy.load": ("allow_pickle", False)}
# Configs and sweeps are Python files that the user names on the command line.
ALLOWED = {("diffusion/pipelines/config.py", "runpy.run_path"), ("launch/points.py", "runpy.run_path")}


def faults(source: str) -> list[str]:
    """Returns the imports and calls in a source file that could execute what it reads."""
    tree, names, found = ast.parse(source), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.partition(".")[0] in MODULES]
            names |= {alias.asname or alias.name.partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [node.module] * (node.module.partition(".")[0] in MODULES)
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        first, dot, rest = ast.unparse(node.func).partition(".")
        name = f"{names.get(first, first)}{dot}{rest}"
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if name in CALLS or given.get("shell") == "True" or given.get("allow_pickle") == "True":
            found.append(name)
        keyword, value = KEYWORDS.get(name, (None, None))
        if keyword and given.get(keyword) != str(value):
            found.append(name)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_that_is_read_is_executed(path):
    where = path.relative_to(ROOT).as_posix()
    assert [name for name in faults(path.read_text()) if (where, name) not in ALLOWED] == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from dill import loads", "import joblib as j", "eval('1')", "exec(text)",
        "compile('', '', 'exec')", "import yaml", "import torch\ntorch.load(path)", "import os\nos.system(text)",
        "import numpy as np\nnp.load(path)", "from numpy import load\nload(path, mmap_mode='r')",
        "import numpy\nnumpy.load(path, allow_pickle=True)", "import runpy as r\nr.run_path(p)",
        "import subprocess\nsubprocess.run(text, shell=True)",
    ],
)  # fmt: skip
def test_the_search_finds_faults(source):
    assert faults(source)


def test_the_search_accepts_harmless_calls():
    source = "import numpy as np\nnp.load(path, allow_pickle=False)\nre.compile('a')\nstep.lower(x).compile()"
    assert faults(source) == []


# Arrays of objects, which NumPy unpickles.

OBJECTS = np.array([{"a": 1}, None], object)


class Trap:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["x", "label"])
def test_npy_refuses_objects(tmp_path, name):
    np.save(tmp_path / "x.npy", np.zeros((2, 4, 4, 1), np.uint8))
    np.save(tmp_path / "label.npy", np.zeros(2, np.int32))
    np.save(tmp_path / f"{name}.npy", np.array([Trap(tmp_path / "sprung")] * 2, object), allow_pickle=True)
    with refused("data.path"):
        build("data", {"name": "npy", "path": str(tmp_path), "num_classes": 2})
    np.savez(tmp_path / "both.npz", x=OBJECTS)
    (tmp_path / "both.npz").rename(tmp_path / f"{name}.npy")
    with refused("data.path"):
        build("data", {"name": "npy", "path": str(tmp_path), "num_classes": 2})
    assert not (tmp_path / "sprung").exists()


@pytest.fixture
def pictures(tmp_path):
    """A folder of two images, with its saved index."""
    for number in range(2):
        (tmp_path / "set" / f"class{number}").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / f"class{number}" / "a.png")
    folder_of(tmp_path / "set")
    return tmp_path / "set"


def folder_of(path):
    return build("data", {"name": "folder", "path": str(path), "size": 8})


@pytest.mark.parametrize("name", ["paths", "paths_ends", "labels"])
def test_an_index_refuses_objects(pictures, name):
    np.save(pictures / ".index" / f"{name}.npy", np.array([Trap(pictures / "sprung")], object), allow_pickle=True)
    with refused("data.path"):
        folder_of(pictures)
    assert not (pictures / "sprung").exists()


@pytest.mark.parametrize("name", ["../../secret.png", "/etc/passwd", "class0/../../secret.png", "a\0b"])
def test_an_index_does_not_lead_out_of_its_folder(pictures, name):
    """The index is stored with the images, and so may come from another source."""
    Image.new("RGB", (8, 8), "red").save(pictures.parent / "secret.png")
    names = [name.encode(), b"class1/a.png"]
    np.save(pictures / ".index/paths.npy", np.frombuffer(b"".join(names), np.uint8))
    np.save(pictures / ".index/paths_ends.npy", np.cumsum([len(name) for name in names], dtype=np.uint64))
    source = folder_of(pictures)
    with refused("path"):
        source[0]
    assert source[1]["x"].shape == (8, 8, 3)


@pytest.mark.parametrize("labels", [[0, 7], [0]])
def test_an_index_with_wrong_labels_is_refused(pictures, labels):
    np.save(pictures / ".index/labels.npy", np.array(labels, np.int32))
    with refused("data.path"):
        folder_of(pictures)


@pytest.mark.parametrize("header", ["[]", "{}", '{"format": 1}', '{"format": 1, "class_names": 3, "changed": {}}'])
def test_an_index_with_an_invalid_header_is_rebuilt(pictures, header):
    (pictures / ".index/index.json").write_text(header)
    assert len(folder_of(pictures)) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [("dtype", "object"), ("dtype", "O"), ("shape", [-1, 8, 3]), ("shape", 8), ("shape", []), ("num_classes", "2"),
     ("num_classes", -1), ("class_names", None), ("captions", None), ("low", "0"), ("count", 1e300)],
)  # fmt: skip
def test_the_description_of_a_prepared_data_set_is_checked(tmp_path, field, value):
    info = {"format": 1, "count": 0, "dtype": "uint8", "class_names": [], "shape": [8, 8, 3], "num_classes": 0,
            "low": 0.0, "high": 255.0, "captions": False}  # fmt: skip
    (tmp_path / "info.json").write_text(json.dumps({**info, field: value}))
    with refused("data.path"):
        build("data", {"name": "array_record", "path": str(tmp_path)})


# Names that become paths.

OUTSIDE = ["../x", "..", "/etc/passwd", "a/../../x", "a\0b", "", ".", "gs://x"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("family", ["samplers", "networks", "evaluation", "grids", "data"])
def test_a_part_is_not_found_by_a_path(family, name):
    with refused("name"):
        find(family, name, field="name")


@pytest.mark.parametrize("name", OUTSIDE)
def test_the_weights_of_a_model_are_read_from_its_folder_only(tmp_path, name):
    """The index of the weights names files; a file outside the folder is not read."""
    inside = tmp_path / "model"
    inside.mkdir()
    safetensors.numpy.save_file({"secret": np.zeros(1, np.float32)}, tmp_path / "x")
    (inside / f"{model_folder.WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"secret": name}}))
    with refused("folder") as caught:
        model_folder.read_tensors(str(inside))
    assert "in the same folder" in str(caught.value)


@pytest.mark.parametrize("places", [None, [], {"a": 1}, {"a": None}, "x"])
def test_an_invalid_index_of_weights_is_refused(tmp_path, places):
    (tmp_path / f"{model_folder.WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    with refused("folder"):
        model_folder.read_tensors(str(tmp_path))


def test_the_names_of_tensors_are_not_paths(tmp_path):
    """They stay keys: no file is opened or created by their names."""
    tensors = {name: np.ones(1, np.float32) for name in ("../x", "/etc/x", "a/../../b")}
    safetensors.numpy.save_file(tensors, tmp_path / model_folder.WEIGHTS)
    before = sorted(tmp_path.parent.rglob("*"))
    assert model_folder.read_tensors(str(tmp_path)).keys() == tensors.keys()
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_averages_are_named_by_numbers():
    """Their names are parts of the names of arrays in checkpoints."""
    averages = make_ema(decays=(0.0, 1e-300, 0.999999999999))
    assert all(float(name) >= 0 and "/" not in name for name in averages.names)
    for decay in ("../x", float("nan"), -0.5):
        with refused("ema.decays"):
            call(make_ema, {"decays": (decay,)}, field="ema")
