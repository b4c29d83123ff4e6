"""Guarantees of the kernel for segments: exact at any length, and nothing outside is touched (E10).

What `tests/unit/test_attention.py` asks of every backend is not repeated. Without a GPU the kernels
are interpreted; with one they are compiled, and these tests carry the mark `gpu` as well.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from apb.attention.base import AttentionPartial, Segment
from apb.attention.reference import ReferenceBackend
from apb_kernels.segment_attention import Partial, segment_attention
from apb_kernels.segments import Span, tile_table, unseen_rows
from apb_kernels.tiles import TileConfig
from devices import at_home

CLOSE = 3e-6
POINTERS = TileConfig(rows=16, keys=16, warps=4, stages=1)
DESCRIPTORS = replace(POINTERS, tma=True)


def draw(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(device=device, dtype=dtype)


def draw_segment(
    start: int, stop: int, num_keys: int | None, head_dim: int, device: str
) -> Segment:
    """Causal without a number of keys."""
    length = stop - start if num_keys is None else num_keys
    k_KSD, v_KSD = draw(2, 2, length, head_dim, device=device)
    return Segment(start, stop, k_KSD, v_KSD, causal=num_keys is None)


def attend_exactly(
    q_HTD: Tensor, segments: list[Segment], scale: float, carry: AttentionPartial | None = None
) -> AttentionPartial:
    return ReferenceBackend().attend(
        q_HTD.double(),
        [replace(s, k_KSD=s.k_KSD.double(), v_KSD=s.v_KSD.double()) for s in segments],
        scale=scale,
        carry=carry,
    )


def assert_exact(found: Partial, exact: AttentionPartial, tolerance: float = CLOSE) -> None:
    for x, truth in zip(found, exact, strict=True):
        torch.testing.assert_close(x.double(), truth, atol=tolerance, rtol=tolerance)


@st.composite
def packings(draw_from: st.DrawFn) -> list[tuple[int, int, int | None]]:
    """Row ranges beside each other or apart, each with a few segments; None is causal."""
    spans, reached = [], 0
    for _ in range(draw_from(st.integers(0, 3))):
        start = reached + draw_from(st.integers(0, 4))
        stop = start + draw_from(st.integers(0, 41))
        for num_keys in draw_from(st.lists(st.none() | st.integers(0, 50), max_size=3)):
            spans.append((start, stop, num_keys))
        reached = stop
    return draw_from(st.permutations(spans))


@pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])
@at_home
@settings(deadline=None, max_examples=25)
@given(spans=packings(), group_size=st.sampled_from([1, 2, 3, 5]), with_carry=st.booleans())
def test_any_packing_equals_the_specification(
    config: TileConfig,
    device: str,
    spans: list[tuple[int, int, int | None]],
    group_size: int,
    with_carry: bool,
) -> None:
    num_rows = max((stop for _, stop, _ in spans), default=3) + 2
    q_HTD = draw(2 * group_size, num_rows, 16, device=device)
    segments = [draw_segment(*span, 16, device) for span in spans]
    carry = None
    if with_carry:
        earlier = [draw_segment(0, num_rows, 7, 16, device)]
        carry = Partial(*segment_attention(q_HTD, earlier, scale=0.25))
        segments_so_far = [*earlier, *segments]
    else:
        segments_so_far = segments
    found = segment_attention(q_HTD, segments, scale=0.25, carry=carry, config=config)
    assert_exact(found, attend_exactly(q_HTD, segments_so_far, 0.25))


@at_home
@pytest.mark.parametrize("head_dim", [8, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "descriptors"])
def test_head_sizes(head_dim: int, tma: bool, device: str) -> None:
    q_HTD = draw(6, 19, head_dim, device=device)
    segments = [draw_segment(0, 19, keys, head_dim, device) for keys in (None, 21)]
    scale = head_dim**-0.5
    found = segment_attention(q_HTD, segments, scale=scale, config=replace(POINTERS, tma=tma))
    assert_exact(found, attend_exactly(q_HTD, segments, scale))


@at_home
def test_keys_and_values_stay_where_they_are(device: str) -> None:
    """Prefixes of a buffer whose rest is poison, queries and carry with foreign strides."""
    buffer_2SKD = torch.full((2, 40, 3, 16), math.nan, device=device)
    buffer_2SKD[:, :23, :2] = draw(2, 23, 2, 16, device=device)
    k_KSD, v_KSD = buffer_2SKD.transpose(1, 2)[:, :2, :23]
    q_HTD = draw(17, 4, 48, device=device)[..., 16:32].transpose(0, 1)
    carry = Partial(
        torch.full((4, 17, 16), 9.0, device=device).transpose(0, 1),
        torch.full((4, 17), -math.inf, device=device).mT,
    )
    segments = [Segment(2, 17, k_KSD, v_KSD)]
    found = segment_attention(q_HTD, segments, scale=0.3, carry=carry, config=POINTERS)
    assert found is carry
    exact = attend_exactly(q_HTD, segments, 0.3)
    assert_exact(Partial(*(x[2:] for x in found)), AttentionPartial(*(x[2:] for x in exact)))
    assert (found.out_THD[:2] == 9.0).all()


@at_home
def test_offsets_beyond_32_bits(device: str) -> None:
    """Rows that lie more than 2^31 elements apart; 4 GB, of which a CPU only backs what is used."""
    far = 2**31 + 64
    storage = torch.empty(far + 80, dtype=torch.float16, device=device)
    k_KSD = storage.as_strided((1, 2, 16), (16, far, 1))
    v_KSD = storage.as_strided((1, 2, 16), (16, far, 1), storage_offset=32)
    k_KSD.copy_(draw(1, 2, 16))
    v_KSD.copy_(draw(1, 2, 16))
    q_HTD = draw(2, 3, 16, device=device, dtype=torch.float16)
    segments = [Segment(0, 3, k_KSD, v_KSD)]
    found = segment_attention(q_HTD, segments, scale=0.25, config=POINTERS)
    assert_exact(found, attend_exactly(q_HTD, segments, 0.25), tolerance=2e-3)


@given(
    spans=packings(),
    group_size=st.integers(1, 5),
    tile_rows=st.sampled_from([16, 32]),
)
def test_tiles_cover_each_packed_row_once_and_the_longest_come_first(
    spans: list[tuple[int, int, int | None]], group_size: int, tile_rows: int
) -> None:
    kept = sorted(
        Span(start, stop, stop - start if keys is None else keys, keys is None)
        for start, stop, keys in spans
        if stop > start and keys != 0
    )
    covered: list[tuple[int, int]] = []
    work = []
    for first_token, num_tokens, first_row, first, last in tile_table(
        tuple(kept), group_size, tile_rows, torch.device("cpu")
    ).tolist():
        rows = range(first_row, min(first_row + tile_rows, num_tokens * group_size))
        covered += [(first_token + row // group_size, row % group_size) for row in rows]
        assert len({span[:2] for span in kept[first:last]}) == 1
        assert kept[first][:2] == (first_token, first_token + num_tokens)
        seen = rows[-1] // group_size + 1
        work.append(sum(seen if s.causal else s.num_keys for s in kept[first:last]))
    assert work == sorted(work, reverse=True)
    tokens = {token for span in kept for token in range(span.start, span.stop)}
    assert sorted(covered) == sorted((t, g) for t in tokens for g in range(group_size))
    gaps = {t for start, stop in unseen_rows(kept, 200) for t in range(start, stop)}
    assert gaps == set(range(200)) - tokens


class Uneven(NamedTuple):
    """A segment that nobody has checked."""

    start: int
    stop: int
    k_KSD: Tensor
    v_KSD: Tensor
    causal: bool


Q, K = torch.zeros(4, 5, 16), torch.zeros(2, 5, 16)
SEGMENT = Segment(0, 5, K, K)


@pytest.mark.parametrize(
    ("q_HTD", "segments", "scale", "words"),
    [
        (Q.double(), [], 1.0, r"q_HTD.dtype=torch.float64 is not supported; supported are torch."),
        (Q[None], [], 1.0, "q_HTD has 4 dimensions"),
        (torch.zeros(4, 5, 12), [], 1.0, "head size 12 of q_HTD is not supported; supported are"),
        (torch.zeros(4, 5, 264), [], 1.0, "head size 264"),
        (torch.zeros(4, 16, 8).mT, [], 1.0, r"q_HTD.stride\(-1\)=8 is not supported"),
        (torch.zeros(4, 5, 17)[..., :16], [], 1.0, r"q_HTD.stride\(0\)=85 is not supported"),
        (torch.zeros(4, 5, 32)[..., 1:17], [], 1.0, "q_HTD does not start at a multiple of 16"),
        (Q, [SEGMENT], 0.0, "scale=0.0 is not supported"),
        (Q, [replace(SEGMENT, k_KSD=K.half())], 1.0, r"segments\[0\].k_KSD.dtype=torch.float16"),
        (Q, [replace(SEGMENT, v_KSD=K[:, :4])], 1.0, r"segments\[0\].v_KSD has shape \(2, 4, 16\)"),
        (Q, [replace(SEGMENT, k_KSD=torch.zeros(3, 5, 16))], 1.0, r"k_KSD has 3 heads; a divisor"),
        (Q, [replace(SEGMENT, k_KSD=K.to("meta"))], 1.0, "k_KSD.device=meta is not the queries'"),
        (Q, [Uneven(0, 5, K[:, :3], K[:, :3], True)], 1.0, "causal with 3 keys for 5 rows"),
        (Q, [replace(SEGMENT, stop=6)], 1.0, r"segments\[0\] has rows 0 to 6 of 5"),
        (Q, [SEGMENT, replace(SEGMENT, start=3)], 1.0, "overlapping rows 0 to 5 and 3 to 5"),
    ],
)
def test_bad_arguments_are_named(
    q_HTD: Tensor, segments: list[Segment | Uneven], scale: float, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        segment_attention(q_HTD, segments, scale=scale)
