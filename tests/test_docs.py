"""The Python examples in the documentation run as they are written."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]


def blocks(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


@pytest.mark.parametrize(("page", "steps"), [("docs/adding.md", 20), ("docs/finetuning.md", 3)])
def test_the_examples_run(page, steps):
    namespace: dict = {}
    exec(compile("\n".join(blocks(page)), page, "exec"), namespace)
    assert namespace["trainer"].step == steps


@pytest.mark.parametrize(
    "page", [path.relative_to(ROOT).as_posix() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]]
)
def test_the_examples_are_python(page):
    for code in blocks(page):
        compile(code, page, "exec")


@pytest.mark.parametrize(
    "page", ["README.md", "launch/README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
