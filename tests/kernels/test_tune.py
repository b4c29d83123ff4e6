"""Tuning takes no tile sizes that change the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from apb_kernels.decode_attention import decode_attention
from apb_kernels.segment_attention import Partial, segment_attention
from apb_kernels.tiles import TileConfig
from apb_kernels.tune import DTYPES, Segment, Sizes, Workload
from devices import at_home

SIZES = Sizes(kv_heads=1, local=70, upstream=45, shard=200)
SMALL = TileConfig(rows=64, keys=16, warps=4, stages=1)
LOST = 16


def lossy_decode(
    q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, length: Tensor, **how: Any
) -> Partial:
    return decode_attention(q_HTD, k_KSD, v_KSD, length - LOST, **how)


def lossy_segments(q_HTD: Tensor, segments: Sequence[Segment], **how: Any) -> Partial:
    local, last = segments
    kept = last._replace(k_KSD=last.k_KSD[:, LOST:], v_KSD=last.v_KSD[:, LOST:])
    return segment_attention(q_HTD, [local, kept], **how)


@at_home
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kernel", ["segment", "decode"])
def test_a_lost_tile_of_keys_is_noticed_and_rounding_is_not(
    kernel: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = Workload(kernel, SIZES, dtype=dtype, head_dim=64, device=device, sharpness=4.0)
    found = work.run(SMALL)
    assert work.is_exact(found)
    assert not work.is_exact(Partial(found.out_THD, found.lse_TH + 0.01))
    monkeypatch.setattr("apb_kernels.tune.decode_attention", lossy_decode)
    monkeypatch.setattr("apb_kernels.tune.segment_attention", lossy_segments)
    assert not work.is_exact(work.run(SMALL))
