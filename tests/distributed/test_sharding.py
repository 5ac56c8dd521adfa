import jax
import pytest
from jax.sharding import PartitionSpec as P

from diffusion.distributed import mesh, sharding
from diffusion.types import InputError

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
    assert placed["params"]["net"]["a"]["kernel"] == placed["mu"]["net"]["a"]["kernel"] == P("model", None)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("kernel", ("modle",)), r"rules\[0\]: no mesh axis 'modle'"),
        (("kernel", ("fsdp", None, None)), r"rules\[0\]: has 3 axes, but .*kernel has 2 dimensions"),
        (("bias", ("fsdp",)), r"rules\[0\]: splits a dimension of 3 of bias into 2"),
    ],
)
def test_bad_rules(mesh_of, rule, message):
    with pytest.raises(InputError, match=message):
        specs((rule,), mesh_of(1, 2, 1))


def test_mesh_fills_one_axis():
    made = mesh.make(data=-1, fsdp=2, model=2)
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
        mesh.make(**sizes)
