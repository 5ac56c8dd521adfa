import pytest

from diffusion.core.build import build, names
from diffusion.core.types import InputError
from diffusion.sampling.samplers.ddim import DDIM


def test_builds_from_name_and_from_spec():
    assert build("samplers", "ddim") == DDIM(0.0)
    assert build("samplers", {"name": "ddim", "eta": 0.5}) == DDIM(0.5)
    assert build("samplers", {"name": "ddim", "eta": 1}) == DDIM(1)  # an int will do for a float


def test_names_are_found_by_listing():
    assert {"ancestral", "ddim"} <= set(names("samplers"))
    assert {"eps", "x0", "v"} <= set(names("parameterization"))
    assert {"uniform", "stratified"} <= set(names("time_sampling"))
    assert "pipeline" not in names("data")  # it has no make()


def test_a_new_file_is_a_new_part(monkeypatch, tmp_path):
    (tmp_path / "mine.py").write_text("def make(a: int = 1):\n    return ('mine', a)\n")
    import diffusion.sampling.samplers

    monkeypatch.setattr(diffusion.sampling.samplers, "__path__", [*diffusion.sampling.samplers.__path__, str(tmp_path)])
    assert build("samplers", {"name": "mine", "a": 2}) == ("mine", 2)


@pytest.mark.parametrize(
    ("family", "spec", "message"),
    [
        ("samplers", "dimm", r"samplers.name: no 'dimm' in samplers; did you mean 'ddim'\?.*ancestral"),
        ("samplers", {}, r"samplers.name: is missing; one of: .*ddim"),
        ("samplers", {"name": "ddim", "etta": 1.0}, r"samplers.etta: diffusion/samplers/ddim.py .*did you mean 'eta'"),
        (
            "samplers",
            {"name": "ddim", "eta": "big"},
            r"samplers.eta: diffusion/samplers/ddim.py wants float, got 'big'",
        ),
        ("samplers", {"name": "ddim", "eta": True}, r"samplers.eta: .* wants float, got True"),
        ("samplers", {"name": "ddim", "eta": 2.0}, r"samplers.eta: must be in \[0, 1\]"),
        ("networks", {"name": "unet", "width": 8}, r"networks.shape: is missing"),
        (
            "objectives",
            {"name": "denoising", "schedule": {"name": "vp", "beta_end": 3.0}},
            r"objectives.schedule.beta_end: ",
        ),
    ],
)
def test_errors_name_field_and_fix(family, spec, message):
    with pytest.raises(InputError, match=message):
        build(family, spec)
