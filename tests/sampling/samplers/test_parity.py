"""The live peers: all cases, each against the kept arrays and against our sampler. They are there if
requirements-peers.txt is installed; `make parity` sees to that."""

import importlib.util

import numpy as np
import pytest
from tests.samplers.test_golden import TOLERANCE, ours

from tests.golden.schedulers import CASES, run_peer

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="diffusers is not installed"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peer(case, golden, x64):
    peer = run_peer(case)
    for key, value in peer.items():
        np.testing.assert_allclose(value, golden[f"{case.name}/{key}"], atol=TOLERANCE * abs(value).max())
    right = peer["mended" if case.peer_halves_second_derivative else "x"]
    found = ours(case, peer["times"], peer["start"])
    np.testing.assert_allclose(found, right, atol=TOLERANCE * abs(right).max())
