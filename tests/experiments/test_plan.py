"""The job that plans a training: on virtual devices, on TPU slices if their compiler is installed, and its errors."""

import importlib.util
import json

import jax
import pytest

from diffusion.core.build import build
from diffusion.pipelines import capacity
from diffusion.pipelines.config import resolve
from diffusion.profiling import cost_model
from diffusion.profiling.cost_model import TooLarge
from tests.jobs import job
from tests.refusals import refused_field
from tests.text_folders import write_pipeline
from tests.vae_folders import VAE, write_vae

MOONS = "--config=configs/moons.py"
WIDE = ("--config.network.width=16384", "--config.network.depth=2")  # a state of 40 GiB
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the compiler for TPUs: requirements-tpu.txt"
)


def plan(*flags, config=MOONS):
    return job("plan", config, *flags)


def mesh(data, fsdp):
    return f"--config.mesh.data={data}", f"--config.mesh.fsdp={fsdp}"


@pytest.mark.slow
def test_text_and_json_agree(tmp_path):
    file = tmp_path / "plan.json"
    done = plan("--mesh_devices=8", *mesh(2, 4), "--config.sharding.fsdp_min_size=0", "--chip=H100", f"--json={file}")
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["devices"] == {"kind": "cpu", "count": 8, "mesh": {"data": 2, "fsdp": 4, "model": 1}}
    assert f"{found['parameters']['count']:,}" in done.stdout
    memory = found["bytes_per_device"]
    assert memory["state"] <= 1.1 * memory["state_ideal"] and memory["total"] > memory["state"]
    assert "prediction, not a measurement" in done.stdout and found["prediction"]["step_seconds"] > 0
    for kind in found["collectives"]["kinds"]:
        assert kind in done.stdout
    assert sum(array["bytes"] for array in found["arrays"]) >= 4 * found["parameters"]["count"]


@pytest.mark.slow
def test_the_work_per_device_does_not_grow_with_the_number_of_devices(tmp_path):
    """Compares FLOPs and bytes as counted by XLA, at 8,192 examples per device, so that the state's share is small."""
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
    ("flags", "field"),
    [
        ((), "--topology"),
        (("--topology=v5e:2x2", "--mesh_devices=8"), "--topology"),
        (("--topology=v5e:2x2", "--chip=H100"), "--chip"),
        (("--topology=v9:2x2",), "--topology"),
        (("--mesh_devices=0",), "--mesh_devices"),
        (("--mesh_devices=8", *mesh(-1, 3)), "mesh.fsdp"),
        (("--mesh_devices=8", "--config.train.batch_size=12"), "train.batch_size"),
        (("--mesh_devices=8", "--shape=2,x"), "--shape"),
    ],
)
def test_bad_input_is_one_line(flags, field):
    assert refused_field(plan(*flags)) == field


def test_data_that_are_not_on_this_machine():
    done = plan("--mesh_devices=1", "--config.data.data_dir=/nowhere", config="--config=configs/imagenet64_adm.py")
    assert refused_field(done) == "data.dataset" and "--shape=H,W,C [--classes=N]" in done.stderr


@pytest.mark.slow
def test_a_training_that_is_too_large_is_refused_with_a_change_that_fits():
    """A state of 40 GiB must be sharded over chips of 16 GiB."""
    done = plan("--mesh_devices=8", *mesh(8, 1), *WIDE, "--chip=v5e")
    assert refused_field(done) == "config" and "it fits with --config.mesh.data=" in done.stderr


def small_config(network, **sections):
    return {"data": {"name": "digits"}, "objective": {"name": "denoising"}, "network": network,
            "train": {"batch_size": 16}, **sections}  # fmt: skip


UNET = {"name": "unet", "width": 8, "channel_mult": (1,), "num_res_blocks": 1, "attention_resolutions": (),
        "head_dim": 8}  # fmt: skip
MLP = {"name": "mlp", "width": 8, "depth": 1}


@pytest.mark.parametrize(
    ("network", "proposed"),
    [(UNET, True), ({**UNET, "remat": "full"}, False), (MLP, False)],
    ids=["unet, default remat", "unet, full remat", "mlp without remat"],
)
def test_rematerialisation_is_proposed_by_the_networks_default(network, proposed):
    """A U-Net that does not set `remat` does no rematerialisation, so the planner may turn it on."""
    config = resolve(small_config(network))
    config["network"] = network  # a config from Python need not be resolved
    parts = capacity.train_program(config, capacity.data_source(config), jax.devices()[:1])
    changes = capacity.candidate_changes(config, parts, TooLarge(used=2.0**30, limit=2.0**29))
    assert ({"network.remat": "full"} in changes) == proposed
    assert any("train.accumulate" in change for change in changes)


def test_an_autoencoder_in_the_step_is_counted(tmp_path, caplog):
    """Its weights are not needed. Latents, as of a cache, have none of it in the step."""
    vae = {"name": "kl", "path": write_vae(tmp_path, (8, 8, 1))}
    config = resolve(small_config(MLP, autoencoder=vae, sharding={"rules": (("net/", None),)}))
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    devices = jax.devices()[:1]
    found, excess = capacity.estimate(config, capacity.data_source(config), devices, None)
    latents = capacity.train_program(config, capacity.data_source(config, "4,4,2", 10), devices)
    assert excess is None and not latents["program"].frozen

    flops, memory = found["flops"], found["bytes_per_device"]
    without = cost_model.products(latents["program"], latents["batch"])
    assert flops["as_traced"] - without == 16 * flops["encoding_of_an_image"] > 0
    assert flops["training"] == 16 * (3 * flops["forward_of_an_image"] + flops["encoding_of_an_image"])
    params = jax.eval_shape(build("networks", VAE, shape=(8, 8, 1)).init, jax.random.key(0))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert memory["autoencoder"] == 4 * count == 4 * sum(module["count"] for module in found["parameters"]["frozen"])
    held = memory["state"] + memory["autoencoder"] + memory["batch"]  # with the decoder, which the step does not use
    assert memory["total"] - memory["temporaries"] - memory["program"] >= held
    share = 16 * flops["encoding_of_an_image"] / flops["as_traced"]
    assert f"{share:.1%} of the step" in capacity.report(found, 0)
    parts = capacity.train_program(config, capacity.data_source(config), devices)
    changes = capacity.candidate_changes(config, parts, TooLarge(used=2.0**30, limit=2.0**29))
    assert changes[0] == {"autoencoder.slices": True} and len(changes) > 1
    assert not caplog.messages  # the rule is for the network alone


def test_a_pipeline_without_weights_and_tokenizers(tmp_path):
    """Captions and size conditions of data that are not on this machine follow from the options of the data."""
    path = write_pipeline(tmp_path, "sdxl")
    vae = write_vae(tmp_path / "vae", (8, 8, 3))
    for file in tmp_path.rglob("*"):
        if file.suffix == ".safetensors" or file.parent.name.startswith("tokenizer"):
            file.unlink()
    network = {
        "name": "unet_text",
        "width": 4,
        "channel_mult": (1,),
        "num_res_blocks": 1,
        "depth": (1,),
        "num_heads": 2,
    }
    config = resolve(
        small_config(
            network,
            data={"name": "folder", "path": "none", "size": 8, "labels": False, "captions": True,
                  "size_conditions": "sdxl"},
            autoencoder={"name": "kl", "path": vae},
            text_encoder={"name": "joined", "path": path, "layout": "sdxl"},
        )
    )  # fmt: skip
    parts = capacity.train_program(config, capacity.data_source(config, "8,8,3"), jax.devices()[:1])
    assert parts["batch"]["cond"]["time_ids"].shape == (16, 6)
    assert {"autoencoder", "text_encoder"} <= parts["program"].frozen.keys()
    assert cost_model.products(parts["program"], parts["batch"]) > 0
    config["data"] |= {"captions": False, "size_conditions": None}
    assert capacity.data_source(config, "8,8,3").spec.conditions == {}


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
    assert refused_field(plan("--topology=v5e:3x3")) == "--topology"


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="libtpu is installed")
def test_a_missing_compiler_is_named_with_how_to_install_it():
    done = plan("--topology=v5e:2x2")
    assert refused_field(done) == "--topology" and "pip install -r requirements-tpu.txt" in done.stderr
