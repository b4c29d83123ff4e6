"""Guarantees of packed linear layers: the plain product, and only where it is of use."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from apb import packed
from apb.packed import MAX_ROWS, pack_linears


def make_layer(*, bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(96, 160, bias=bias).to(dtype).requires_grad_(False)
    for weight in layer.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator))
    return layer


def rows(count: int) -> Tensor:
    return torch.randn(1, count, 96, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("count", [1, 2, 7, 12, MAX_ROWS])
def test_few_rows_get_the_plain_product(bias: bool, count: int) -> None:
    layer, x = make_layer(bias=bias), rows(count)
    exact = nn.functional.linear(
        x.double(), layer.weight.double(), layer.bias.double() if bias else None
    )
    plain_error = (layer(x) - exact).abs().max()
    assert pack_linears(layer)
    assert layer(x).shape == exact.shape
    assert (layer(x) - exact).abs().max() <= 4 * plain_error


def test_many_rows_are_left_to_the_plain_product() -> None:
    layer, x = make_layer(bias=True), rows(MAX_ROWS + 1)
    plain = layer(x)
    pack_linears(layer)
    layer.weight.zero_()  # a packed copy would not notice
    assert torch.equal(layer(x), layer.bias.expand_as(plain))


def test_nothing_is_packed_where_the_cpu_has_no_such_product() -> None:
    layer = make_layer(bias=False, dtype=torch.float16)
    assert not pack_linears(layer)
    assert "forward" not in vars(layer)


def test_nothing_is_packed_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(bias=False)
    monkeypatch.setattr(packed, "_available_bytes", lambda: 2 * layer.weight.nbytes)
    assert not pack_linears(layer)
