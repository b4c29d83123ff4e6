"""Guarantee of `ring` and `zigzag`: on the same tensors they equal the package `ring_flash_attn`.

Both also equal plain causal attention, so they cannot agree by being wrong alike.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from apb.attention.base import LayerInputs
from apb.attention.sdpa import SdpaBackend
from apb.cache import CacheShape, KVCacheShard
from apb.comm import Communicator
from apb.methods.base import MethodConfig, PrefillContext
from apb.methods.ring import RingConfig
from apb.methods.zigzag import ZigzagConfig
from flash_attn_stand_in import flash_attn_stand_in
from plans import make_plan
from rank_pool import RankPool
from ranks.cases import make_prompt, max_diff

PoolOf = Callable[[int], RankPool]

NUM_HEADS, HEAD_DIM = 4, 16
SCALE = HEAD_DIM**-0.5
CHUNK = 7
"""The package needs shards of one length, in zigzag two chunks of one length per rank."""
SAME = 1e-5


def make_layer(length: int, num_kv_heads: int) -> LayerInputs:
    """Random tensors of the whole prompt, the same on every rank."""
    generator = torch.Generator().manual_seed(length + num_kv_heads)
    q_HTD, k_KTD, v_KTD = (
        torch.randn(heads, length, HEAD_DIM, generator=generator)
        for heads in (NUM_HEADS, num_kv_heads, num_kv_heads)
    )
    return LayerInputs(0, q_HTD, k_KTD, v_KTD, SCALE)


@torch.inference_mode()
def run_both(
    comm: Communicator, method: MethodConfig, length: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the rank's rows, and their attention by the method and by the package."""
    prompt = make_prompt(length)
    plan = make_plan(method, prompt, world_size=comm.world_size)
    rows = plan.rows(comm.rank, prompt.context_ids, ())
    whole = make_layer(length, num_kv_heads)
    q_HTD, k_KTD, v_KTD = (x[:, list(rows.positions)] for x in whole[1:4])
    shape = CacheShape(1, num_kv_heads, HEAD_DIM, torch.float32)
    context = PrefillContext(
        plan=plan,
        rows=rows,
        cache=KVCacheShard(shape, capacity=len(rows.positions), device=comm.device),
        comm=comm,
        backend=SdpaBackend(),
        step=1,
    )
    attend = method.build(seed=0).begin(context)
    ours_THD = attend(LayerInputs(0, q_HTD, k_KTD, v_KTD, SCALE))
    with flash_attn_stand_in():
        from ring_flash_attn import ring_flash_attn_func, zigzag_ring_flash_attn_func
    function = (
        zigzag_ring_flash_attn_func if isinstance(method, ZigzagConfig) else ring_flash_attn_func
    )
    q, k, v = (x_HTD.transpose(0, 1)[None] for x_HTD in (q_HTD, k_KTD, v_KTD))
    theirs_THD = function(q, k, v, softmax_scale=SCALE, causal=True)[0]
    return torch.tensor(rows.positions), ours_THD, theirs_THD


def dense_attention(layer: LayerInputs) -> Tensor:
    """Causal attention ``[T, H, D]`` of the whole prompt, as its definition says, in fp64."""
    repeats = NUM_HEADS // layer.k_KTD.shape[0]
    k_HTD, v_HTD = (x.double().repeat_interleave(repeats, dim=0) for x in layer[2:4])
    score_HTS = layer.scale * layer.q_HTD.double() @ k_HTD.mT
    weight_HTS = score_HTS.exp().tril()
    out_HTD = weight_HTS / weight_HTS.sum(dim=-1, keepdim=True) @ v_HTD
    return out_HTD.transpose(0, 1).float()


@pytest.mark.parametrize("num_kv_heads", [2, 4])
@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("method", [RingConfig(), ZigzagConfig()], ids=["ring", "zigzag"])
def test_ring_equals_package(
    pool_of: PoolOf, method: MethodConfig, world_size: int, num_kv_heads: int
) -> None:
    with flash_attn_stand_in():
        pytest.importorskip("ring_flash_attn", reason="needs the package ring-flash-attn")
    length = 2 * world_size * CHUNK
    dense_THD = dense_attention(make_layer(length, num_kv_heads))
    ranks = pool_of(world_size).run(run_both, method, length, num_kv_heads)
    seen = torch.cat([positions_T for positions_T, _, _ in ranks])
    assert sorted(seen.tolist()) == list(range(length))
    for positions_T, ours_THD, theirs_THD in ranks:
        assert max_diff(ours_THD, theirs_THD) < SAME
        assert max_diff(ours_THD, dense_THD[positions_T]) < SAME
        assert max_diff(theirs_THD, dense_THD[positions_T]) < SAME
