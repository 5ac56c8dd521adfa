"""Compares the installed peers with the stored arrays and with our samplers, for all cases.

It requires requirements-peers.txt; `make parity` installs it.
"""

import importlib.util

import numpy as np
import pytest

from tests.golden.schedulers import CASES, run_peer
from tests.sampling.samplers.test_golden import TOLERANCE, ours

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peer(case, golden, x64):
    peer = run_peer(case)
    for key, value in peer.items():
        np.testing.assert_allclose(value, golden[f"{case.name}/{key}"], atol=TOLERANCE * abs(value).max())
    correct = peer["mended" if case.peer_halves_second_derivative else "x"]
    found = ours(case, peer["times"], peer["start"])
    np.testing.assert_allclose(found, correct, atol=TOLERANCE * abs(correct).max())
