"""The job that plans: on virtual devices, on TPU slices where their compiler is installed, and what it refuses."""

import importlib.util
import json
import re

import pytest

from tests.jobs import job, one_line

MOONS = "--config=configs/moons.py"
WIDE = ("--config.network.width=16384", "--config.network.depth=2")  # 40 GB of state
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs: requirements-tpu.txt"
)


def plan(*flags, config=MOONS):
    return job("plan", config, *flags)


def mesh(data, fsdp):
    return f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}"


def test_text_and_json_say_the_same(tmp_path):
    file = tmp_path / "plan.json"
    done = plan("--mesh_devices=8", *mesh(2, 4), "--chip=H100", f"--json={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["devices"] == {"kind": "cpu", "count": 8, "mesh": {"data": 2, "fsdp": 4, "model": 1}}
    assert f"{found['parameters']['count']:,}" in done.stdout
    memory = found["bytes_per_device"]
    assert memory["state"] <= 1.1 * memory["state_ideal"] and memory["total"] > memory["state"]
    assert "prediction, not a measurement" in done.stdout and found["prediction"]["step_seconds"] > 0
    for kind in found["collectives"]["kinds"]:
        assert kind in done.stdout
    assert sum(one["bytes"] for one in found["arrays"]) >= 4 * found["parameters"]["count"]


def test_the_work_of_a_device_does_not_grow_with_their_number(tmp_path):
    """What XLA counts, of FLOPs and of bytes, at 8,192 examples a device: enough that the state's part is small."""
    found = {}
    for count in (1, 8, 512):
        file = tmp_path / f"{count}.json"
        batch = f"--config.train.batch_size={8192 * count}"
        done = plan(f"--mesh_devices={count}", *mesh(max(count // 8, 1), min(count, 8)), batch, f"--json={file}")
        assert done.returncode == 0, done.stderr
        found[count] = json.loads(file.read_text())
    flops = [one["xla"]["flops"] for one in found.values()]
    moved = [one["xla"]["bytes_accessed"] for one in found.values()]
    assert max(flops) <= 1.1 * min(flops), flops
    assert max(moved) <= 1.1 * min(moved), moved


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ((), "--topology: is missing"),
        (("--topology=v5e:2x2", "--mesh_devices=8"), "--topology: is missing"),
        (("--topology=v5e:2x2", "--chip=H100"), "--chip: follows from --topology"),
        (("--topology=v9:2x2",), "--topology: no TPU 'v9'; one of: v4, v5e, v5p, v6e"),
        (("--mesh_devices=0",), "--mesh_devices: must be at least 1"),
        (("--mesh_devices=8", *mesh(-1, 3)), "mesh.fsdp: the axes .* do not multiply to the 8 devices"),
        (("--mesh_devices=8", "--config.train.batch_size=12"), "train.batch_size: 12 examples cannot be divided"),
        (("--mesh_devices=8", "--shape=2,x"), "--shape: must be sizes such as 32,32,4"),
    ],
)
def test_bad_input_is_one_line(flags, line):
    assert re.search(line, one_line(plan(*flags)))


def test_data_that_are_not_here():
    adm = "--config=configs/imagenet64_adm.py"
    refused = one_line(plan("--mesh_devices=1", "--config.data.data_dir=/nowhere", config=adm))
    assert "data.dataset: " in refused and "--shape=H,W,C [--classes=N]" in refused


def test_too_large_is_refused_with_what_helps():
    """A state of 40 GiB for chips of 16, which has to be in parts."""
    done = plan("--mesh_devices=8", *mesh(8, 1), *WIDE, "--chip=v5e")
    assert done.returncode == 2
    line = done.stderr.strip().splitlines()
    assert len(line) == 1 and "config: does not fit: " in line[0]
    assert "it fits with --config.mesh.data=" in line[0]


@NEEDS_LIBTPU
def test_a_tpu_slice(tmp_path):
    file = tmp_path / "plan.json"
    done = plan("--topology=v5e:2x2", *mesh(1, 4), f"--json={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["devices"]["kind"] == "TPU v5 lite" and found["devices"]["count"] == 4
    assert found["collectives"]["total"] > 0


@NEEDS_LIBTPU
def test_a_slice_that_does_not_exist():
    assert "--topology: no 'v5e:3x3': " in one_line(plan("--topology=v5e:3x3"))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="it is installed")
def test_says_what_to_install():
    assert "pip install -r requirements-tpu.txt" in one_line(plan("--topology=v5e:2x2"))
