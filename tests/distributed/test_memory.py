"""No process of several ever has a whole state in its memory: not where it is made, saved or restored."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.jobs import ROOT

PROCESSES = 2
PART = """
import json, math, resource, runpy, sys
import jax
from diffusion.checkpoint import Checkpoints
from diffusion.distributed import multihost
from diffusion.types import Spec
from experiments import planning

address, rank, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
multihost.initialize(address, 2, rank)
config = runpy.run_path("configs/imagenet256_dit.py")["get_config"]("B/2")
config.mesh.data, config.mesh.fsdp, config.train.batch_size = 1, 2, 8
program = planning.program_of(config.to_dict(), Spec((32, 32, 4), 1000), jax.devices())["program"]
checkpoints = Checkpoints(workdir)
if checkpoints.latest() is None:
    state = jax.block_until_ready(program.init(None))
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    checkpoints.save(1, state, {}, {}, {})
else:
    state, _ = checkpoints.restore(1, program.state)
    jax.block_until_ready(state)
    made = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
checkpoints.close()
shard = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
print(json.dumps({"shard": shard / 2**30, "peak": made / 2**20}), flush=True)
"""


@pytest.mark.slow
def test_a_state_is_born_and_restored_in_parts(tmp_path):
    for what in ("born", "restored"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        running = [subprocess.Popen([sys.executable, "-c", PART, address, str(rank), tmp_path], cwd=ROOT, text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"})
                   for rank in range(PROCESSES)]  # fmt: skip
        for process in running:
            stdout, stderr = process.communicate(timeout=200)
            assert process.returncode == 0, stderr
            told = json.loads(stdout.splitlines()[-1])
            assert 0.9 < told["shard"] < 1
            assert told["peak"] < 1.2 * told["shard"] + 1, what
