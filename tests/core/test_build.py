import sys
import types

import pytest

from diffusion.core import build as build_module
from diffusion.core.build import build, check, defaults, names
from diffusion.sampling.samplers import ddim
from diffusion.sampling.samplers.ddim import DDIM
from tests.refusals import refused


@pytest.fixture
def other_package(monkeypatch):
    """Installs a package outside the repository, with a module of parts."""
    package, module = types.ModuleType("other"), types.ModuleType("other.parts")

    class Namespace:
        @staticmethod
        def make(size: int = 1):
            return "nested", size

    module.make = lambda size=1, *, shape: ("made", size, shape)
    module.Namespace, module.number, module.without_signature = Namespace, 3, type
    monkeypatch.setitem(sys.modules, "other", package)
    monkeypatch.setitem(sys.modules, "other.parts", module)


def test_builds_from_name_and_from_section():
    assert build("samplers", "ddim") == DDIM(0.0)
    assert build("samplers", {"name": "ddim", "eta": 0.5}) == DDIM(0.5)


def test_an_int_for_a_float_becomes_a_float():
    eta = build("samplers", {"name": "ddim", "eta": 1}).eta
    assert eta == 1 and type(eta) is float


def test_the_home_folder_in_paths(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    paths = build("samplers", {"name": lambda path, paths: (path, paths), "path": "~/a", "paths": ("~/b", "c", 3)})
    assert paths == ("/home/me/a", ("/home/me/b", "c", 3))


def test_names_are_found_by_listing():
    assert {"ancestral", "ddim"} <= set(names("samplers"))
    assert {"eps", "x0", "v"} <= set(names("parameterization"))
    assert {"uniform", "stratified"} <= set(names("time_sampling"))
    assert "pipeline" not in names("data")  # it defines no make()
    assert {"cfg", "rescale"} <= set(names("guidance"))  # functions of a package's files, in its `__all__`
    assert not {"Traced", "common", "dot"} & set(names("guidance"))
    with refused("family"):
        names("encoders")


def test_a_new_file_is_a_new_part(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("def make(a: int = 1):\n    return ('mine', a)\n")
    import diffusion.sampling.samplers

    monkeypatch.setattr(diffusion.sampling.samplers, "__path__", [*diffusion.sampling.samplers.__path__, str(tmp_path)])
    assert build("samplers", {"name": "mine", "a": 2}) == ("mine", 2)


@pytest.mark.parametrize(("public", "parts"), [(None, ["helper", "part"]), (["NAMES", "part"], ["part"])])
def test_the_parts_of_a_module_are_its_public_functions(monkeypatch, public, parts):
    """`__all__`, if it is defined, excludes public helpers."""
    module = types.ModuleType("family_of_functions")
    exec("NAMES = ()\ndef part(): return 7\ndef helper(): pass\ndef _private(): pass", vars(module))
    if public is not None:
        module.__all__ = public
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(build_module.FAMILIES, "grids", module.__name__)
    assert names("grids") == parts
    assert build("grids", "part") == 7
    if public is not None:
        with refused("grids.name"):
            build("grids", "helper")


def test_parts_from_other_packages(other_package):
    assert build("networks", "other.parts:make", shape=(2,)) == ("made", 1, (2,))
    assert build("networks", {"name": "other.parts:make", "size": 5}, shape=(2,)) == ("made", 5, (2,))
    assert build("networks", {"name": "other.parts:Namespace.make", "size": 3}) == ("nested", 3)


@pytest.mark.parametrize(
    "name",
    [
        "other.missing:make",
        "other.parts:missing",
        "other.parts:",
        ":make",
        "other.parts:number",
        "other.parts:without_signature",
    ],
)
def test_an_attribute_that_cannot_be_used_is_refused(other_package, name):
    with refused("network.name"):
        build("networks", name, field="network")


def test_callables_are_parts():
    def make(size: int, **options):
        return size, options

    class Part:
        def __init__(self, eta: float = 0.0):
            self.eta = eta

    assert build("schedules", {"name": make, "size": 3, "more": 4}) == (3, {"more": 4})
    assert build("samplers", {"name": Part, "eta": 0.5}).eta == 0.5
    assert build("samplers", Part).eta == 0.0
    assert build("samplers", ddim.make) == DDIM(0.0)
    with refused("samplers.eta"):
        build("samplers", {"name": Part, "eta": "big"})
    with refused("samplers.etta"):
        build("samplers", {"name": Part, "etta": 0.5})
    with refused("schedules.size"):
        build("schedules", make)


def test_a_callable_receives_the_given_keywords_that_it_accepts():
    """A part of the library must accept all of them."""
    assert build("networks", lambda shape: shape, shape=(2,), num_classes=10) == (2,)
    assert build("networks", lambda **given: given, shape=(2,), num_classes=10) == {"shape": (2,), "num_classes": 10}
    assert build("networks", lambda *args, num_classes: num_classes, shape=(2,), num_classes=10) == 10
    with refused("samplers.shape"):
        build("samplers", "ddim", shape=(2,))


def test_a_given_keyword_cannot_be_set_by_a_section():
    with refused("networks.shape"):
        build("networks", {"name": "mlp", "shape": (2,)}, shape=(2,))


def test_defaults():
    def make(shape, width: int = 8, *, dtype: str = "float32", mode: str | None = None, **more):
        pass

    assert defaults(make) == {"width": 8, "dtype": "float32", "mode": None}
    assert defaults(make, later=("width", "shape")) == {"dtype": "float32", "mode": None}


def test_keywords_that_are_supplied_later_are_not_missing():
    def make(shape: tuple[int, ...], width: int):
        pass

    check(make, {"width": 8}, field="network", later=("shape",))
    with refused("network.shape"):
        check(make, {"width": 8}, field="network")
    with refused("network.shape"):
        check(make, {"width": 8, "shape": (2,)}, field="network", later=("shape",))


@pytest.mark.parametrize(
    ("family", "spec", "field"),
    [
        ("samplers", "dimm", "samplers.name"),
        ("samplers", {}, "samplers.name"),
        ("samplers", {"name": 3}, "samplers.name"),
        ("samplers", {"name": "ddim", "etta": 1.0}, "samplers.etta"),
        ("samplers", {"name": "ddim", "eta": "big"}, "samplers.eta"),
        ("samplers", {"name": "ddim", "eta": True}, "samplers.eta"),
        ("samplers", {"name": "ddim", "eta": 2.0}, "samplers.eta"),
        ("samplers", {"name": "ddim", "eta": float("nan")}, "samplers.eta"),
        ("schedules", {"name": "vp", "num_steps": 2**31}, "schedules.num_steps"),
        ("networks", {"name": "unet", "width": 8}, "networks.shape"),
        (
            "objectives",
            {"name": "denoising", "schedule": {"name": "vp", "beta_end": 3.0}},
            "objectives.schedule.beta_end",
        ),
    ],
)
def test_errors_name_the_field(family, spec, field):
    with refused(field):
        build(family, spec)


def test_errors_suggest_the_nearest_name():
    with refused("samplers.name") as caught:
        build("samplers", "dimm")
    assert "'ddim'" in caught.value.problem
    with refused("samplers.etta") as caught:
        build("samplers", {"name": "ddim", "etta": 1.0})
    assert "'eta'" in caught.value.problem
    with refused("objectives.name") as caught:
        build("objectives", "flow")
    assert "did you mean 'flow_matching'" in caught.value.problem


def test_a_grid_is_built_with_its_schedule():
    times = build("grids", {"name": "karras", "rho": 5.0}, schedule=build("schedules", "edm"), steps=4)
    assert len(times) == 5 and times[-1] == 0
