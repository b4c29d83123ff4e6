"""Guarantees of the decoding kernel: exact for any number of rows, splits and tail (E10)."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apb_kernels.decode_attention import MAX_ROWS, Tail, decode_attention
from apb_kernels.segment_attention import Partial
from apb_kernels.tiles import TileConfig
from devices import at_home

SMALL = TileConfig(rows=32, keys=16, warps=4, stages=1)


def attend_exactly(
    q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, visible_TS: Tensor, scale: float
) -> Partial:
    """In fp64, under a mask."""
    groups = q_HTD.shape[0] // k_KSD.shape[0]
    k_HSD, v_HSD = (x.double().repeat_interleave(groups, dim=0) for x in (k_KSD, v_KSD))
    scores_HTS = (q_HTD.double() @ k_HSD.mT * scale).masked_fill(~visible_TS, -math.inf)
    out_HTD = scores_HTS.softmax(dim=-1).nan_to_num() @ v_HSD
    return Partial(out_HTD.transpose(0, 1), scores_HTS.logsumexp(dim=-1).mT)


def length_of(num_keys: int, device: str) -> Tensor:
    return torch.tensor([num_keys], dtype=torch.int32, device=device)


def assert_exact(found: Partial, exact: Partial) -> None:
    for x, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), truth, atol=3e-6, rtol=3e-6)


def draw_tree(num_rows: int, seed: int) -> Tensor:
    """Every node sees itself and its ancestors."""
    generator = torch.Generator().manual_seed(seed)
    visible_TN = torch.eye(num_rows, dtype=torch.bool)
    for node in range(1, num_rows):
        parent = int(torch.randint(-1, node, (), generator=generator))
        if parent >= 0:
            visible_TN[node] |= visible_TN[parent]
    return visible_TN


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
@at_home
@settings(deadline=None, max_examples=20)
@given(
    num_rows=st.sampled_from([1, 2, 5, 17, MAX_ROWS]),
    group_size=st.sampled_from([1, 3, 4]),
    num_keys=st.integers(0, 70),
    num_splits=st.integers(1, 5),
    tail=st.sampled_from(["none", "causal", "tree"]),
    seed=st.integers(0, 99),
)
def test_any_split_equals_attention_over_shard_and_tail(
    tma: bool,
    device: str,
    num_rows: int,
    group_size: int,
    num_keys: int,
    num_splits: int,
    tail: str,
    seed: int,
) -> None:
    """The shard's spare room is poison."""
    q_HTD = torch.randn(2 * group_size, num_rows, 16, device=device)
    shard = torch.full((2, 2, num_keys + 9, 16), math.nan, device=device)
    shard[:, :, :num_keys] = torch.randn(2, 2, num_keys, 16)
    own_k, own_v = torch.randn(2, 2, num_rows, 16, device=device)
    tree_TN = draw_tree(num_rows, seed).to(device) if tail == "tree" else None
    found = decode_attention(
        q_HTD,
        shard[0],
        shard[1],
        length_of(num_keys, device),
        scale=0.25,
        tail=None if tail == "none" else Tail(own_k, own_v, tree_TN),
        config=replace(SMALL, tma=tma),
        num_splits=num_splits,
    )
    k_KSD, v_KSD = shard[:, :, :num_keys]
    visible_TS = torch.ones(num_rows, num_keys, dtype=torch.bool, device=device)
    if tail != "none":
        k_KSD, v_KSD = torch.cat([k_KSD, own_k], dim=1), torch.cat([v_KSD, own_v], dim=1)
        own_TN = torch.ones(num_rows, num_rows, dtype=torch.bool, device=device).tril()
        visible_TS = torch.cat([visible_TS, own_TN if tree_TN is None else tree_TN], dim=1)
    assert_exact(found, attend_exactly(q_HTD, k_KSD, v_KSD, visible_TS, 0.25))


@pytest.mark.gpu
def test_a_captured_launch_follows_the_length() -> None:
    q_HTD = torch.randn(8, 3, 64, device="cuda", dtype=torch.bfloat16)
    k_KSD, v_KSD = torch.randn(2, 2, 4096, 64, device="cuda", dtype=torch.bfloat16)
    length = length_of(100, "cuda")

    def run() -> Partial:
        return decode_attention(q_HTD, k_KSD, v_KSD, length, scale=0.125)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for num_keys in (4096, 1, 777):
        length.fill_(num_keys)
        graph.replay()
        for x, expected in zip(captured, run(), strict=True):
            assert torch.equal(x, expected)


Q, K = torch.zeros(4, 5, 16), torch.zeros(2, 30, 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q_HTD": torch.zeros(4, 65, 16)}, "q_HTD has 65 rows; supported are 1 to 64"),
        ({"q_HTD": torch.zeros(4, 0, 16)}, "q_HTD has 0 rows"),
        ({"scale": -1.0}, "scale=-1.0"),
        ({"num_splits": 0}, "num_splits=0"),
        ({"k_KSD": K.half()}, "k_KSD.dtype=torch.float16 is not the queries'"),
        ({"v_KSD": K[:, :3]}, r"v_KSD has shape \(2, 3, 16\), k_KSD \(2, 30, 16\)"),
        ({"length": torch.zeros(1)}, "length has dtype torch.float32"),
        ({"length": torch.zeros(2, dtype=torch.int32)}, "2 elements; one int32 is wanted"),
        ({"tail": Tail(K[:, :4], K[:, :4])}, "a causal tail has as many keys as rows; 4 and 5"),
        ({"tail": Tail(K[:, :5], K[:, :4])}, "equal ones of 2 heads"),
        (
            {"tail": Tail(K[:, :4], K[:, :4], torch.ones(5, 5, dtype=torch.bool))},
            r"tail.visible_TN is torch.bool of shape \(5, 5\)",
        ),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {
        "q_HTD": Q,
        "k_KSD": K,
        "v_KSD": K,
        "length": length_of(30, "cpu"),
        "scale": 1.0,
        "tail": None,
    }
    with pytest.raises(ValueError, match=words):
        decode_attention(**{**arguments, **changes})  # type: ignore[arg-type]
