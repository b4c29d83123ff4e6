"""Guarantees of wire formats: what they keep, what they lose at most, and that prefixes decode."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from apb.cost import NOMINAL_CPU, CostModel, Workload
from apb.methods.wire import Wire, WireFormat
from plans import SHAPE

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

formats = pytest.mark.parametrize("format", WireFormat, ids=lambda format: format.name)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def wire(format: WireFormat, dtype: torch.dtype, heads: int = 3, head_dim: int = 6) -> Wire:
    return Wire(format, heads, head_dim, dtype)


def tokens(of: Wire, num_tokens: int, *, seed: int = 0) -> Tensor:
    """Keys and values whose heads differ in size by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_tokens, 2, of.num_kv_heads, of.head_dim)
    sizes = 10 ** (4 * torch.rand(*shape[:3], 1, generator=generator) - 2)
    return (torch.randn(shape, generator=generator) * sizes).to(of.dtype)


@dtypes
def test_auto_keeps_every_bit(dtype: torch.dtype) -> None:
    auto = wire(WireFormat.auto, dtype)
    kv_N2KD = tokens(auto, 7)
    assert torch.equal(auto.decode(auto.encode(kv_N2KD)), kv_N2KD)


@dtypes
def test_bfloat16_keeps_what_bfloat16_can_hold(dtype: torch.dtype) -> None:
    half = wire(WireFormat.bfloat16, dtype)
    kv_N2KD = tokens(half, 7)
    decoded_N2KD = half.decode(half.encode(kv_N2KD))
    assert decoded_N2KD.dtype == dtype
    assert torch.equal(decoded_N2KD, kv_N2KD.to(torch.bfloat16).to(dtype))
    assert half.encode(kv_N2KD).element_size() == 2


@given(
    num_tokens=st.integers(1, 6),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from((2, 6, 64)),
    seed=st.integers(0, 1000),
)
def test_int8_is_off_by_at_most_half_a_step_of_each_head(
    num_tokens: int, heads: int, head_dim: int, seed: int
) -> None:
    int8 = wire(WireFormat.int8, torch.float32, heads, head_dim)
    kv_N2KD = tokens(int8, num_tokens, seed=seed)
    error_N2KD = (int8.decode(int8.encode(kv_N2KD)) - kv_N2KD).abs()
    step_N2K1 = kv_N2KD.abs().amax(dim=-1, keepdim=True) / 127
    assert (error_N2KD <= step_N2K1 * (0.5 + 1e-4)).all()


def test_int8_takes_a_byte_per_element_and_four_per_head() -> None:
    int8 = wire(WireFormat.int8, torch.float32)
    rows_NY = int8.encode(tokens(int8, 4))
    assert rows_NY.dtype == torch.uint8
    assert rows_NY.shape == (4, 2 * 3 * (6 + 4))


@formats
@dtypes
def test_beginning_of_a_message_is_the_message_of_the_beginning(
    format: WireFormat, dtype: torch.dtype
) -> None:
    this = wire(format, dtype)
    kv_N2KD = tokens(this, 6)
    message_NY = this.encode(kv_N2KD)
    for length in range(7):
        assert torch.equal(message_NY[:length], this.encode(kv_N2KD[:length]))
        decoded_N2KD = this.decode(message_NY[:length])
        assert torch.equal(decoded_N2KD, this.decode(message_NY)[:length])
        assert decoded_N2KD.shape == (length, 2, 3, 6)


@formats
@dtypes
@pytest.mark.parametrize("num_tokens", [0, 1, 4])
def test_empty_tells_shape_and_dtype_of_a_message(
    format: WireFormat, dtype: torch.dtype, num_tokens: int
) -> None:
    this = wire(format, dtype)
    message_NY, empty_NY = this.encode(tokens(this, num_tokens)), this.empty(num_tokens)
    assert (empty_NY.shape, empty_NY.dtype) == (message_NY.shape, message_NY.dtype)
    assert empty_NY.device.type == "meta"


@formats
@dtypes
def test_zero_vectors_stay_zero(format: WireFormat, dtype: torch.dtype) -> None:
    this = wire(format, dtype)
    kv_N2KD = tokens(this, 3)
    kv_N2KD[1, 0] = 0
    decoded_N2KD = this.decode(this.encode(kv_N2KD))
    assert (decoded_N2KD[1, 0] == 0).all()
    assert decoded_N2KD.isfinite().all()


@formats
@dtypes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_do_not_become_finite(
    format: WireFormat, dtype: torch.dtype, value: float
) -> None:
    """A model that overflows has to be noticed, also where its keys have travelled."""
    this = wire(format, dtype)
    kv_N2KD = tokens(this, 3)
    kv_N2KD[1, 1, 2, 3] = value
    decoded_N2KD = this.decode(this.encode(kv_N2KD))
    assert not decoded_N2KD[1, 1, 2, 3].isfinite()
    others = torch.ones(3, 2, 3, dtype=torch.bool)
    others[1, 1, 2] = False
    assert decoded_N2KD[others].isfinite().all()


@formats
@dtypes
def test_the_cost_model_counts_the_bytes_of_messages(
    format: WireFormat, dtype: torch.dtype
) -> None:
    costs = CostModel(shape=SHAPE, rates=NOMINAL_CPU, itemsize=dtype.itemsize)
    heads, head_dim = SHAPE.num_kv_heads, SHAPE.head_dim
    work = Workload(9, 9, 11 * SHAPE.kv_elements, element_bytes=format.element_bytes(head_dim))
    assert costs.received_bytes(work) == wire(format, dtype, heads, head_dim).empty(11).nbytes
