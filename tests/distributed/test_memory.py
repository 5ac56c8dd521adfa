"""In a job of several processes, none ever holds the whole state: not when it is created, saved or restored."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.jobs import ROOT

PROCESSES = 2
PROCESS = """
import json, sys
import jax
from diffusion.distributed import multihost
from diffusion.pipelines import capacity
from diffusion.pipelines.config import read_config
from diffusion.training.checkpoint import Checkpoints

def peak_memory():  # in GiB; not `ru_maxrss`, which includes the memory of the process that started this one
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20

address, rank, workdir = sys.argv[1], int(sys.argv[2]), sys.argv[3]
multihost.initialize(address, 2, rank)
config = read_config("configs/imagenet256_dit.py:B/2")
config["mesh"] |= {"data": 1, "fsdp": 2}
config["train"]["batch_size"] = 8
data = capacity.data_source(config, "32,32,4", 1000)
program = capacity.train_program(config, data, jax.devices())["program"]
checkpoints = Checkpoints(workdir)
if checkpoints.latest() is None:
    state = jax.block_until_ready(program.init(None, {}))
    peak = peak_memory()
    checkpoints.save(1, state, {}, {}, {})
else:
    state, _ = checkpoints.restore(1, program.state)
    jax.block_until_ready(state)
    peak = peak_memory()
checkpoints.close()
shard = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
print(json.dumps({"shard": shard / 2**30, "peak": peak}), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_a_state_is_created_and_restored_in_shards(tmp_path):
    for what in ("created", "restored"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        running = [subprocess.Popen([sys.executable, "-c", PROCESS, address, str(rank), tmp_path], cwd=ROOT, text=True,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                    env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"})
                   for rank in range(PROCESSES)]  # fmt: skip
        for process in running:
            stdout, stderr = process.communicate(timeout=200)
            assert process.returncode == 0, stderr
            found = json.loads(stdout.splitlines()[-1])
            assert 0.9 < found["shard"] < 1
            assert found["peak"] < 1.2 * found["shard"] + 1, what
