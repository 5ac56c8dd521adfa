"""The house's rules, read from the source."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# Lower layers first; a file imports only from layers below its own, or from its own layer's other families by name
# through `build`. Names are those of files and folders under diffusion/.
LAYERS = [
    {"types"},
    {"arrays", "files", "build", "progress"},
    {
        "parameterization",
        "times",
        "weighting",
        "grids",
        "schedules",
        "layers",
        "analytic",
        "gaussian",
        "posterior",
        "solver",
        "multistep",
        "exponential",
        "likelihood",
        "distillation",
        "flow_map",
        "curriculum",
    },
    {"objectives", "samplers", "guidance", "networks", "data"},
    {"sample", "macs", "evaluation", "visualize", "distributed", "training", "checkpoint", "interop", "planning"},
]
FAMILIES = {"schedules", "objectives", "samplers", "networks", "data", "evaluation"}
FILES = sorted((ROOT / "diffusion").rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(name: str) -> str:
    """`diffusion.samplers.ddim` -> `samplers`."""
    return name.split(".")[1]


def layer(part: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path):
    relative = path.relative_to(ROOT).with_suffix("")
    if len(relative.parts) == 2 and relative.name == "__init__":
        return
    mine = relative.parts[1]
    for name in imports(path):
        assert not name.startswith(("experiments", "configs", "launch")), f"{relative} imports {name}"
        if not name.startswith("diffusion."):
            continue
        theirs = part_of(name)
        assert layer(theirs) <= layer(mine), f"{relative} imports {name}, from above"
        if theirs in FAMILIES:
            own = mine == theirs and not has_make(name)
            pipeline = name.startswith("diffusion.data") and mine == "training"
            assert own or pipeline, f"{relative} imports {name}; families are reached through build"


def has_make(name: str) -> bool:
    path = ROOT / (name.replace(".", "/") + ".py")
    return path.exists() and "\ndef make(" in path.read_text()


def test_libraries_stay_in_their_rooms():
    for path in FILES:
        used, where = imports(path), path.relative_to(ROOT / "diffusion").as_posix()
        assert where == "checkpoint.py" or not any(name.startswith("orbax") for name in used), where
        assert not any(name.startswith(("ml_collections", "absl.app")) for name in used), where
        # Which has no flag of ours, but must have those of grain parsed.
        assert where == "data/pipeline.py" or "absl.flags" not in used, where
        roots = {name.partition(".")[0] for name in used}
        assert not roots & {"torch", "diffusers", "transformers", "tensorflow"}, where
        assert where == "data/tfds.py" or "tensorflow_datasets" not in roots, where
        assert where.startswith(("layers/", "networks/")) or not any(name.startswith("flax") for name in used), where


def test_configs_import_ml_collections_alone():
    for path in (ROOT / "configs").rglob("*.py"):
        ours = {name for name in imports(path) if name.startswith(("diffusion", "experiments", "launch"))}
        assert ours <= ({"launch.vary"} if path.parent.name == "sweeps" else set()), path


def test_launch_starts_jobs_and_is_started_by_none():
    for path in (ROOT / "experiments").rglob("*.py"):
        assert not any(name.startswith("launch") for name in imports(path)), path
    for path in (ROOT / "launch").rglob("*.py"):  # nothing that computes
        ours = {name.removeprefix("diffusion.") for name in imports(path) if name.startswith("diffusion.")}
        assert all(name.split(".")[0] in ("types", "files", "build", "training") for name in ours), path


def test_files_stay_readable():
    for path in [*FILES, *(path for top in ("experiments", "launch") for path in (ROOT / top).rglob("*.py"))]:
        assert len(path.read_text().splitlines()) <= 400, path
