"""Meshes, sharding rules and the parts of a batch."""

import itertools
import logging
import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

from diffusion.distributed import mesh, sharding
from tests.refusals import refused

STATE = {
    "params": {"net": {"a": {"kernel": jax.ShapeDtypeStruct((6, 16), "float32")}}},
    "mu": {"net": {"a": {"kernel": jax.ShapeDtypeStruct((6, 16), "float32")}}},
    "bias": jax.ShapeDtypeStruct((3,), "float32"),
    "step": jax.ShapeDtypeStruct((), "int32"),
}


def specs(rules, mesh, fsdp_min_size=0):
    return jax.tree.map(lambda place: place.spec, sharding.of_state(STATE, mesh, rules, fsdp_min_size))


def test_arrays_without_a_rule_are_sharded_over_fsdp(mesh_of):
    placed = specs((), mesh_of(1, 4, 1))
    assert placed["params"]["net"]["a"]["kernel"] == P(None, "fsdp")
    assert placed["bias"] == placed["step"] == P()


def test_the_first_rule_applies_to_the_whole_state(mesh_of):
    rules = (("a/kernel$", ("model", None)), ("kernel", (None, "model")))
    placed = specs(rules, mesh_of(1, 2, 2))
    assert placed["params"]["net"]["a"]["kernel"] == placed["mu"]["net"]["a"]["kernel"] == P("model", "fsdp")
    placed = specs((("a/kernel$", ("model", "data")), ("bias", None)), mesh_of(2, 3, 1))
    assert placed["params"]["net"]["a"]["kernel"] == P("fsdp", "data") and placed["bias"] == P()


def test_small_arrays_are_sharded_over_fsdp_by_rule_only(mesh_of):
    """The kernels have 6 x 16 = 96 elements."""
    made = mesh_of(1, 2, 2)

    def kernel(rules, size):
        return specs(rules, made, size)["params"]["net"]["a"]["kernel"]

    assert kernel((), 96) == P(None, "fsdp") and kernel((), 97) == P()
    model, fsdp = (("kernel", ("model", None)),), (("kernel", ("model", "fsdp")),)
    assert kernel(model, 96) == P("model", "fsdp") and kernel(model, 97) == P("model")
    assert kernel(fsdp, 97) == P("model", "fsdp")
    large = jax.ShapeDtypeStruct((2**9, 2**9), "float32"), jax.ShapeDtypeStruct((2**9, 2**9 - 2), "float32")
    assert [place.spec for place in sharding.of_state(large, made)] == [P("fsdp"), P()]


@pytest.mark.parametrize(
    "rule", [("kernel", ("modle",)), ("kernel", ("fsdp", None, None)), ("[", ("fsdp",)), ("bias", ("fsdp",))]
)
def test_bad_rules(mesh_of, rule):
    with refused("sharding.rules[0]"):
        specs((rule,), mesh_of(1, 2, 1))


def test_one_axis_takes_the_remaining_devices():
    made = mesh.make_mesh(data=-1, fsdp=2, model=2)
    assert dict(made.shape) == {"data": 2, "fsdp": 2, "model": 2}
    assert set(made.axis_types) == {jax.sharding.AxisType.Auto}
    assert sharding.batch_shards(made) == 4


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"data": -1, "fsdp": -1}, "fsdp"),
        ({"data": 0}, "data"),
        ({"data": -1, "fsdp": 3}, "fsdp"),
        ({"data": 4}, "data"),
        ({"data": 2, "fsdp": 8}, "data"),
    ],
)
def test_bad_meshes(sizes, field):
    with refused(field):
        mesh.make_mesh(**sizes)


class Device:
    """A device of a pod that does not exist."""

    def __init__(self, number, per_slice):
        self.id, self.slice_index, self.process_index = number, number // per_slice, 0
        self.platform, self.device_kind = "cpu", "cpu"


def devices(count, slices=1):
    return [Device(number, count // slices) for number in range(count)]


WIDTHS = [(1152, 1152), (28, 1152, 3456), (28, 1152, 4608), (28, 6912)]  # of DiT-XL


def shard_of(place, shape):
    sizes = [math.prod(place.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
             for axes in place.spec]  # fmt: skip
    return tuple(size // part for size, part in itertools.zip_longest(shape, sizes, fillvalue=1))


@pytest.mark.parametrize("shape", WIDTHS)
def test_512_shards_of_widths_that_only_128_divides(shape):
    made = mesh.make_mesh(fsdp=512, devices=devices(512))
    assert dict(made.shape) == {"data": 1, "fsdp": 128, "fsdp_rest": 4, "model": 1}
    assert sharding.batch_shards(made) == 512
    place = sharding.of_state(jax.ShapeDtypeStruct(shape, "float32"), made, fsdp_min_size=0)
    assert math.prod(shard_of(place, shape)) == math.prod(shape) // 512


def test_fsdp_in_a_rule_stands_for_both_of_its_axes():
    made = mesh.make_mesh(fsdp=256, model=2, devices=devices(512))
    kernel = jax.ShapeDtypeStruct((1024, 256), "float32")
    assert sharding.of_state(kernel, made, (("", ("fsdp", "model")),)).spec == P(("fsdp", "fsdp_rest"), "model")
    assert sharding.of_state(kernel, made, (("", (None, "model")),)).spec == P(("fsdp", "fsdp_rest"), "model")
    with refused("sharding.rules[0]"):
        sharding.of_state(kernel, made, (("", ("fsdp", "fsdp")),))


def test_data_runs_over_the_slices_of_a_pod_first():
    made = mesh.make_mesh(data=4, fsdp=2, devices=devices(8, slices=2))
    assert [[device.slice_index for device in row.flat] for row in made.devices] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with refused("data"):
        mesh.make_mesh(data=1, fsdp=8, devices=devices(8, slices=2))


def test_which_part_of_a_batch_a_process_reads():
    def part(devices, process, **sizes):
        made = mesh.make_mesh(**sizes, devices=devices)
        return sharding.part_of_process(sharding.by_example(made), 16, process)

    eight = devices(8)
    for device in eight:
        device.process_index = device.id // 2
    assert [part(eight, process, data=8) for process in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [part(eight, process, data=2, model=4) for process in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [part(eight, process, data=2, fsdp=2, model=2) for process in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert part(eight[:2], 0, fsdp=2) == (0, 1)


def test_a_rule_that_matches_nothing_is_logged(caplog):
    """A rule may be for arrays that are not trained."""
    rules = (("bias", None), ("bia", ("fsdp",)), ("x+y", ("fsdp",)), ("decoder", None))
    with caplog.at_level(logging.WARNING, logger="diffusion"):
        sharding.warn_of_unused(rules, STATE, {"decoder": jax.ShapeDtypeStruct((3,), "float32")})
    assert ["rules[1]" in text or "rules[2]" in text for text in caplog.messages] == [True, True]


def test_large_replicated_arrays_are_listed(mesh_of):
    """Those without a dimension that fsdp divides, or with a rule, but not those that are small."""
    shapes = {"odd": (1021, 1021), "rule": (1024, 1024), "small": (3,), "medium": (512, 510), "sharded": (512, 512)}
    tree = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in shapes.items()}

    def listed(mesh, **options):
        places = sharding.of_state(tree, mesh, (("rule", None),), **options)
        placed = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)
        return sharding.replicated_arrays(placed, **options)

    assert listed(mesh_of(1, 4, 1)) == {"odd": 4 * 1021**2, "rule": 4 * 1024**2}
    assert listed(mesh_of(1, 4, 1), fsdp_min_size=0).keys() == {"odd", "rule"}
    assert listed(mesh_of(1, 4, 1), fsdp_min_size=2**20).keys() == {"rule"}
    assert not listed(mesh_of(1, 1, 1))
