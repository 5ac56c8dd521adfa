"""Checks the rules of docs/architecture.md that can be read from the source."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# From the bottom up. A package imports from its own layer and from the layers below it.
LAYERS = [
    {"core"},
    {"process", "distributed", "layers"},
    {"objectives", "networks", "encoders", "sampling", "data"},
    {"training", "evaluation", "interop", "profiling", "adapters"},
    {"pipelines"},
]
# Modules that hold parts. `build` reaches them by name; nothing imports them.
FAMILIES = ("process.schedules", "objectives", "networks", "sampling.samplers", "data.sources", "evaluation")
FILES = sorted((ROOT / "diffusion").rglob("*.py"))
PACKAGES = sorted(path.name for path in (ROOT / "diffusion").iterdir() if path.is_dir() and path.name[0] != "_")


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer(package: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if package in layer)


def module_of(name: str) -> str | None:
    """Returns the module that an imported name is, or belongs to: `diffusion.core.types.Array` -> `core.types`."""
    parts = name.split(".")
    for length in range(len(parts), 1, -1):
        path = ROOT.joinpath(*parts[:length])
        if path.with_suffix(".py").exists() or path.is_dir():
            return ".".join(parts[1:length])
    return None


def graph(key) -> dict[str, set[str]]:
    """Returns which of `diffusion`'s modules import which, both grouped by `key`."""
    edges: dict[str, set[str]] = {}
    for path in FILES:
        if path == ROOT / "diffusion" / "__init__.py":
            continue
        module = ".".join(path.relative_to(ROOT / "diffusion").with_suffix("").parts).removesuffix(".__init__")
        found = {module_of(name) for name in imports(path) if name.startswith("diffusion.")} - {None}
        edges.setdefault(key(module), set()).update({key(name) for name in found} - {key(module)})
    return edges


def test_only_the_public_names_stand_at_the_top():
    assert [path.name for path in (ROOT / "diffusion").glob("*.py")] == ["__init__.py"]
    assert set(PACKAGES) <= set().union(*LAYERS)


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_downward(package):
    for path in (ROOT / "diffusion" / package).rglob("*.py"):
        for name in imports(path):
            assert not name.startswith(("experiments", "configs", "launch", "tests")), f"{path} imports {name}"
            if name.startswith("diffusion."):
                assert layer(name.split(".")[1]) <= layer(package), f"{path} imports {name} from a higher layer"


@pytest.mark.parametrize("key", [lambda name: name.split(".")[0], lambda name: name], ids=["packages", "modules"])
def test_imports_have_no_cycle(key):
    graphlib.TopologicalSorter(graph(key)).prepare()


def test_parts_are_reached_through_build():
    for module, found in graph(lambda name: name).items():
        for name in found:
            path = ROOT.joinpath("diffusion", *name.split(".")).with_suffix(".py")
            is_part = name.rpartition(".")[0] in FAMILIES and path.exists() and "\ndef make(" in path.read_text()
            assert not is_part, f"{module} imports the part {name}; use build"


def test_libraries_are_imported_in_their_places_only():
    for path in FILES:
        used, where = imports(path), path.relative_to(ROOT / "diffusion").as_posix()
        roots = {name.partition(".")[0] for name in used}
        assert where == "training/checkpoint.py" or "orbax" not in roots, where
        assert "ml_collections" not in roots or where.startswith("pipelines/"), where
        # The data pipeline makes grain's absl flags readable in programs that do not parse flags.
        assert where == "data/pipeline.py" or "absl" not in roots, where
        assert not roots & {"torch", "diffusers", "transformers", "tensorflow"}, where
        tfds = ("data/sources/tfds.py", "pipelines/tfds_preparation.py")
        assert where in tfds or "tensorflow_datasets" not in roots, where
        assert where.startswith(("layers/", "networks/", "encoders/", "adapters/")) or "flax" not in roots, where


def test_the_library_neither_prints_nor_exits():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                if called == "os._exit" and path.match("data/pipeline.py"):
                    continue  # ends a data worker process, and never the main process
                assert called not in ("print", "sys.exit", "exit", "quit", "os._exit"), f"{path}:{node.lineno} {called}"


def test_launch_starts_jobs_and_is_started_by_none():
    for path in (ROOT / "experiments").rglob("*.py"):
        assert not any(name.startswith("launch") for name in imports(path)), path
