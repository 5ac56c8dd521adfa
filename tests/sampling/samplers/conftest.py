import numpy as np
import pytest

from tests.golden.schedulers import PATH


@pytest.fixture(scope="session")
def golden():
    """Returns the stored results of the peers: `"<case>/times"`, `"<case>/start"`, `"<case>/x"`."""
    with np.load(PATH, allow_pickle=False) as arrays:
        return dict(arrays)
