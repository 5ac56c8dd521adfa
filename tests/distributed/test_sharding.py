import itertools
import math

import jax
import pytest
from jax.sharding import PartitionSpec as P

from diffusion.core.types import InputError
from diffusion.distributed import mesh, sharding

STATE = {
    "params": {"net": {"a": {"kernel": jax.ShapeDtypeStruct((6, 16), "float32")}}},
    "mu": {"net": {"a": {"kernel": jax.ShapeDtypeStruct((6, 16), "float32")}}},
    "bias": jax.ShapeDtypeStruct((3,), "float32"),
    "step": jax.ShapeDtypeStruct((), "int32"),
}


def specs(rules, mesh):
    return jax.tree.map(lambda place: place.spec, sharding.of_state(STATE, mesh, rules))


def test_what_no_rule_matches_is_split_over_fsdp(mesh_of):
    placed = specs((), mesh_of(1, 4, 1))
    assert placed["params"]["net"]["a"]["kernel"] == P(None, "fsdp")
    assert placed["bias"] == placed["step"] == P()


def test_the_first_rule_decides_for_the_whole_state(mesh_of):
    rules = (("a/kernel$", ("model", None)), ("kernel", (None, "model")))
    placed = specs(rules, mesh_of(1, 2, 2))
    assert placed["params"]["net"]["a"]["kernel"] == placed["mu"]["net"]["a"]["kernel"] == P("model", "fsdp")
    placed = specs((("a/kernel$", ("model", "data")), ("bias", None)), mesh_of(2, 3, 1))
    assert placed["params"]["net"]["a"]["kernel"] == P("fsdp", "data") and placed["bias"] == P()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("kernel", ("modle",)), r"rules\[0\]: no mesh axis 'modle'"),
        (("kernel", ("fsdp", None, None)), r"rules\[0\]: has 3 axes, but .*kernel has 2 dimensions"),
        (("[", ("fsdp",)), r"rules\[0\]: '\[' is no regular expression: unterminated"),
        (("bias", ("fsdp",)), r"rules\[0\]: splits a dimension of 3 of bias into 2"),
    ],
)
def test_bad_rules(mesh_of, rule, message):
    with pytest.raises(InputError, match=message):
        specs((rule,), mesh_of(1, 2, 1))


def test_mesh_fills_one_axis():
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
    with pytest.raises(InputError, match=f"^{field}: "):
        mesh.make_mesh(**sizes)


class Part:
    """A device that is nowhere, of a slice of a pod."""

    def __init__(self, number, per_slice):
        self.id, self.slice_index, self.process_index = number, number // per_slice, 0
        self.platform, self.device_kind = "cpu", "cpu"


def parts(count, slices=1):
    return [Part(number, count // slices) for number in range(count)]


WIDTHS = {
    (1152, 1152): {"fsdp": 128, "fsdp_rest": 4},  # DiT-XL
    (28, 1152, 3456): {"fsdp": 128, "fsdp_rest": 4},
    (28, 1152, 4608): {4608: 512},
    (28, 6912): {"fsdp": 128, "fsdp_rest": 4},
}


def shard_of(place, shape):
    sizes = [math.prod(place.mesh.shape[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))
             for axes in place.spec]  # fmt: skip
    return tuple(size // part for size, part in itertools.zip_longest(shape, sizes, fillvalue=1))


@pytest.mark.parametrize("shape", WIDTHS)
def test_512_parts_of_what_128_divide(shape):
    made = mesh.make_mesh(fsdp=512, devices=parts(512))
    assert dict(made.shape) == {"data": 1, "fsdp": 128, "fsdp_rest": 4, "model": 1}
    assert sharding.batch_shards(made) == 512
    place = sharding.of_state(jax.ShapeDtypeStruct(shape, "float32"), made)
    assert math.prod(shard_of(place, shape)) == math.prod(shape) // 512


def test_an_fsdp_of_two_axes_in_a_rule():
    made = mesh.make_mesh(fsdp=256, model=2, devices=parts(512))
    kernel = jax.ShapeDtypeStruct((1024, 64), "float32")
    assert sharding.of_state(kernel, made, (("", ("fsdp", "model")),)).spec == P(("fsdp", "fsdp_rest"), "model")
    assert sharding.of_state(kernel, made, (("", (None, "model")),)).spec == P(("fsdp", "fsdp_rest"), "model")
    with pytest.raises(InputError, match=r"rules\[0\]: splits two dimensions over 'fsdp'"):
        sharding.of_state(kernel, made, (("", ("fsdp", "fsdp")),))


def test_data_runs_over_the_slices_of_a_pod_first():
    made = mesh.make_mesh(data=4, fsdp=2, devices=parts(8, slices=2))
    assert [[device.slice_index for device in row.flat] for row in made.devices] == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(InputError, match="data: must be a multiple of the 2 slices there are, got 1"):
        mesh.make_mesh(data=1, fsdp=8, devices=parts(8, slices=2))


def test_which_part_of_a_batch_a_process_reads():
    def part(devices, process, **sizes):
        made = mesh.make_mesh(**sizes, devices=devices)
        return sharding.part_of_process(sharding.by_example(made), 16, process)

    four = parts(8)
    for device in four:
        device.process_index = device.id // 2
    assert [part(four, process, data=8) for process in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert [part(four, process, data=2, model=4) for process in range(4)] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [part(four, process, data=2, fsdp=2, model=2) for process in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert part(four[:2], 0, fsdp=2) == (0, 1)


def test_a_rule_that_matches_nothing_and_arrays_that_stay_whole(mesh_of, capsys):
    made = mesh_of(1, 4, 1)
    odd = {"odd": jax.ShapeDtypeStruct((1021, 1021), "float32"), "small": jax.ShapeDtypeStruct((3,), "float32")}
    placed = sharding.of_state(odd, made, (("odd", None), ("od", ("fsdp",)), ("x+y", ("fsdp",))))
    told = capsys.readouterr().err.splitlines()
    assert told == [f"warning: sharding.rules[{index}], {pattern!r}, decides for no array"
                    for index, pattern in ((1, "od"), (2, "x+y"))]  # fmt: skip
    assert sharding.replicated_arrays(described(odd, placed)) == {"odd": 4 * 1021**2}
    assert not sharding.replicated_arrays(described(odd, sharding.of_state(odd, mesh_of(1, 1, 1))))


def described(tree, places):
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree, places)
