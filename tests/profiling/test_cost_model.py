"""Tests the cost model on a small DiT, sharded over eight devices."""

import jax
import pytest
from jax.sharding import AbstractMesh

from diffusion.core.build import build
from diffusion.core.trees import path_name
from diffusion.core.types import ArraySpec, Spec, class_labels
from diffusion.distributed import activation_sharding, sharding
from diffusion.profiling import cost_model
from diffusion.profiling.chips import CHIPS
from diffusion.training import ema, optimizer, program
from diffusion.training.state import init_state
from tests.refusals import refused
from tests.tiers import slow_except

SPEC = Spec(ArraySpec((8, 8, 4)), class_labels(10))
TINY = {"name": "dit", "width": 128, "depth": 3, "num_heads": 4, "patch_size": 2}
# Values of (data, fsdp): those of the tables in docs/scaling.md, and other plausible ones.
MESHES = [(1, 4), (8, 32), (16, 32), (1, 8), (4, 128), (32, 8), (64, 8)]


def parts_of(network, shape=SPEC.shape, classes=SPEC.num_classes):
    return dict(
        network=build("networks", network, shape=shape, num_classes=classes),
        objective=build("objectives", {"name": "denoising", "learned_variance": network.get("outputs") == 2}),
        optimizer=optimizer.make_optimizer(steps=10),
        ema=ema.make_ema((0.9,)),
    )


def step_of(mesh, batch_size=64, network=TINY, shape=SPEC.shape, **options):
    made = program.make_program(**parts_of(network, shape), mesh=mesh, seed=0, batch_size=batch_size, fsdp_min_size=0,
                                **options)  # fmt: skip
    return made, program.abstract_batch(Spec(ArraySpec(shape), class_labels(SPEC.num_classes)), batch_size, made.batch)


def test_fsdp_splits_the_state_evenly(mesh_of):
    made, _ = step_of(mesh_of(1, 8, 1))
    memory = cost_model.state_memory(made, mesh_of(1, 8, 1))
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(made.state))
    assert memory["state_ideal"] == whole / 8
    assert memory["state"] <= 1.1 * whole / 8
    assert memory["state"] >= memory["parameters"] + memory["optimizer"] + memory["ema"] > 0.99 * memory["state"]


def test_data_parallelism_replicates_the_state(mesh_of):
    made, _ = step_of(mesh_of(8, 1, 1))
    memory = cost_model.state_memory(made, mesh_of(8, 1, 1))
    assert memory["state"] == memory["state_ideal"]
    assert any(one["replicated"] and one["bytes"] > cost_model.FLAGGED for one in cost_model.arrays(made.state))


@pytest.mark.parametrize("accumulate", slow_except((), (1, 2)))
def test_fsdp_sends_parameters_and_gradients(mesh_of, accumulate):
    """The CPU compiler uses all-reduces instead of reduce-scatters, so the traffic is 4/3 of the ideal."""
    mesh = mesh_of(1, 8, 1)
    made, batch = step_of(mesh, accumulate=accumulate)
    objective = parts_of(TINY)["objective"]
    ideal = cost_model.ideal_traffic(made, objective, mesh, "float32", accumulate)
    sharded = sum(leaf.size * 4 for leaf in jax.tree.leaves(made.state.params) if leaf.size % 8 == 0)
    assert ideal == pytest.approx(accumulate * 3 * sharded * 7 / 8, rel=0.01)
    sent = cost_model.traffic(cost_model.compiled(made, batch), mesh)
    assert sent["total"] <= 4 / 3 * 1.1 * ideal
    assert sent["kinds"]["all-gather"]["bytes"] <= 2 / 3 * 1.1 * ideal


def test_data_parallelism_sends_the_gradients_once(mesh_of):
    mesh = mesh_of(8, 1, 1)
    made, batch = step_of(mesh)
    ideal = cost_model.ideal_traffic(made, parts_of(TINY)["objective"], mesh, "float32", 1)
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(made.state.params))
    assert ideal == pytest.approx(2 * size * 7 / 8)
    assert cost_model.traffic(cost_model.compiled(made, batch), mesh)["total"] <= 1.1 * ideal


@pytest.mark.slow
def test_activation_sharding_reduces_traffic(mesh_of, monkeypatch):
    mesh = mesh_of(1, 8, 1)
    made, batch = step_of(mesh, 512)
    constrained = cost_model.traffic(cost_model.compiled(made, batch), mesh)["total"]
    monkeypatch.setattr(activation_sharding, "enabled", lambda function, place, sequence: function)
    made, batch = step_of(mesh, 512)
    assert cost_model.traffic(cost_model.compiled(made, batch), mesh)["total"] > 1.3 * constrained


@pytest.mark.slow
def test_sequence_parallelism_reduces_memory(mesh_of):
    dit = {"name": "dit", "width": 32, "depth": 2, "num_heads": 2, "kernel": "xla"}
    temporaries = {}
    for sequence in (None, "model"):
        made, batch = step_of(mesh_of(1, 1, 8), 2, network=dit, shape=(32, 32, 1), sequence=sequence)
        temporaries[sequence] = cost_model.compiled(made, batch).memory_analysis().temp_size_in_bytes
    assert temporaries["model"] < temporaries[None] / 4


def test_refuses_a_batch_that_does_not_divide(mesh_of):
    with refused("train.batch_size"):
        step_of(mesh_of(1, 8, 1), batch_size=24, accumulate=2)


@pytest.mark.parametrize(("data", "fsdp"), MESHES)
def test_no_large_array_of_dit_xl_is_replicated(data, fsdp):
    network = {"name": "dit", "width": 1152, "depth": 28, "num_heads": 16, "outputs": 2}
    parts = parts_of(network, (32, 32, 4), 1000)
    state = jax.eval_shape(
        lambda: init_state(parts["objective"], parts["network"], parts["optimizer"], parts["ema"],
                           jax.random.key(0))
    )  # fmt: skip
    kinds = (jax.sharding.AxisType.Auto,) * 3
    places = sharding.of_state(state, AbstractMesh((data, fsdp, 1), ("data", "fsdp", "model"), axis_types=kinds))
    replicated = [path for path, place in jax.tree.leaves_with_path(places) if place.is_fully_replicated]
    sizes = {path_name(path): leaf.size for path, leaf in jax.tree.leaves_with_path(state)}
    assert all(4 * sizes[path_name(path)] < cost_model.FLAGGED for path in replicated)


def test_the_slowest_resource_determines_the_time():
    chip = CHIPS["v5e"]
    memory = {"state": 1e9, "temporaries": 2e9}
    predicted = cost_model.prediction(chip, 4, 100, flops=4e14, memory=memory, sent=1e9)
    assert predicted["seconds"]["compute"] == pytest.approx(1e14 / (197e12 * cost_model.UTILISATION))
    assert predicted["seconds"]["memory"] == pytest.approx(6e9 / 819e9)
    assert predicted["seconds"]["interconnect"] == pytest.approx(1e9 / 200e9)
    assert predicted["bound"] == "compute" and predicted["images_per_second"] == 100 / predicted["step_seconds"]
    assert cost_model.prediction(chip, 4, 100, flops=1, memory=memory, sent=1e12)["bound"] == "interconnect"


@pytest.mark.parametrize(
    "message",
    [
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded by 4.75G.",
        "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (20.50G) exceeds available HBM (15.75G).",
    ],
)
def test_reads_the_memory_required_from_the_compilers_message(message):
    class Step:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError(message)

    class Program:
        step, state, frozen = Step(), None, {}

    with pytest.raises(cost_model.TooLarge) as caught:
        cost_model.compiled(Program, None)
    assert (caught.value.used, caught.value.limit) == (20.5 * 2**30, 15.75 * 2**30)
