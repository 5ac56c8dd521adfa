"""Tests collectives on an abridged TPU program, and on a CPU program whose traffic is counted by hand."""

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from diffusion.profiling.hlo import collectives
from tests.refusals import refused

TPU = """\
HloModule jit_step, is_scheduled=true

%all-reduce-scatter.1 (input: bf16[64,32]) -> bf16[16,32] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %slice = bf16[16,32]{1,0} dynamic-slice(%all-reduce.1, %index)
}

%async_collective_fusion.1 (p: bf16[16,32]) -> bf16[64,32] {
  ROOT %all-gather.1 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%async_collective_fusion.2 (p: bf16[16,32]) -> bf16[64,32] {
  ROOT %all-gather.2 = bf16[64,32]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=2, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
}

%body (state: (s32[], bf16[16,32])) -> (s32[], bf16[16,32]) {
  %one = bf16[64,32]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %two = bf16[64,32]{1,0:T(8,128)} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %three = bf16[16,32]{1,0:T(8,128)} fusion(%two), kind=kCustom, calls=%all-reduce-scatter.1
}

%condition (state: (s32[], bf16[16,32])) -> pred[] {
  %limit = s32[]{:T(128)} constant(28)
  ROOT %lt = pred[]{:T(512)} compare(%count, %limit), direction=LT
}

ENTRY %main (p: bf16[16,32]) -> bf16[16,32] {
  %loop = (s32[], bf16[16,32]{1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %all-reduce.7 = (f32[10]{0:T(128)}, f32[6]{0:T(128)}) all-reduce(%a, %b), channel_id=8, replica_groups=[1,8]<=[8], to_apply=%add
  %permute = (f32[10]{0}, f32[10]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=9, source_target_pairs={{0,1}}
  %scatter = f32[4]{0} reduce-scatter(%d), channel_id=11, replica_groups=[1,8]<=[8], dimensions={0}, to_apply=%add
  %exchange = f32[8,2]{1,0} all-to-all(%c), channel_id=10, replica_groups=[4,2]<=[8], dimensions={0}
}
"""  # noqa: E501


def test_a_tpu_program():
    """An asynchronous all-gather counts once, a loop's as often as it runs; a fused all-reduce is a reduce-scatter."""
    found = [(one.kind, one.runs, one.group, one.sent) for one in collectives(TPU, 8)]
    whole = 64 * 32 * 2
    assert found == [
        ("all-gather", 28, 4, whole * 3 / 4),
        ("reduce-scatter", 28, 4, whole * 3 / 4),
        ("all-reduce", 1, 8, 2 * 16 * 4 * 7 / 8),
        ("collective-permute", 1, 8, 10 * 4),
        ("reduce-scatter", 1, 8, 8 * 4 * 4 * 7 / 8),
        ("all-to-all", 1, 2, 16 * 4 / 2),
    ]


def test_a_loop_may_have_an_unsigned_counter():
    assert collectives(TPU.replace("s32[]", "u32[]"), 8) == collectives(TPU, 8)


def test_refuses_a_loop_of_unknown_length():
    with refused("config"):
        collectives(TPU.replace("direction=LT", "direction=GT"), 8)
    known = TPU.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert {one.runs for one in collectives(known, 8)} == {1, 5}


def test_a_scan_over_sharded_weights(mesh_of):
    """The forward pass gathers the weights of five layers one by one, and sends nothing else."""
    mesh = mesh_of(1, 8, 1)
    place, rows = NamedSharding(mesh, P(None, "fsdp")), NamedSharding(mesh, P("fsdp"))

    def layers(x, weights):
        return jax.lax.scan(lambda x, w: (jax.lax.with_sharding_constraint(jnp.tanh(x @ w), rows), None), x, weights)[0]

    args = jax.ShapeDtypeStruct((16, 32), "float32"), jax.ShapeDtypeStruct((5, 32, 32), "float32")
    text = jax.jit(layers, in_shardings=(rows, place), out_shardings=rows).lower(*args).compile().as_text()
    found = [(one.kind, one.group, one.runs * one.sent) for one in collectives(text, 8)]
    assert found == [("all-gather", 8, 5 * 32 * 32 * 4 * 7 / 8)]
