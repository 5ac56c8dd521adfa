"""Finds configs and vocabularies of published models, for tests that skip where these are absent."""

import os
import pathlib

import pytest

FOLDER = pathlib.Path(os.environ.get("PUBLISHED", pathlib.Path(__file__).parents[2] / "shared/published"))


def published(*parts: str) -> pathlib.Path:
    """Returns the path of a published file or folder, or skips the test."""
    path = FOLDER.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path
