"""Guarantees of the lean decoder: what the modules compute, and what drafters see of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from apb.attention.base import LayerInputs, Segment
from apb.attention.reference import ReferenceBackend
from apb.hf.model import CausalLM
from apb.packed import MAX_ROWS, has_fast_bf16
from apb.speculate.base import Needs
from models import NAMES, apb_model, random_ids


def attend(layer: LayerInputs) -> Tensor:
    num_rows = layer.q_HTD.shape[1]
    segment = Segment(0, num_rows, layer.k_KTD, layer.v_KTD, causal=True)
    return ReferenceBackend().attend(layer.q_HTD, [segment], scale=layer.scale).out_THD


def hidden(model: CausalLM, num_rows: int) -> Tensor:
    ids = random_ids(num_rows, seed=num_rows)
    return model.forward(ids, torch.arange(5, 5 + num_rows), attend)


def by_modules(model: CausalLM) -> CausalLM:
    other = copy.copy(model)
    other._is_lean = False
    return other


def exact(model: CausalLM, num_rows: int) -> Tensor:
    """The same in fp64."""
    return hidden(CausalLM(copy.deepcopy(model.hf).double(), torch.device("cpu")), num_rows)


@pytest.mark.parametrize("num_rows", [1, 2, 9, MAX_ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_lean_states_are_as_exact_as_those_of_the_modules(
    name: str, dtype: torch.dtype, num_rows: int
) -> None:
    cpu = torch.device("cpu")
    model = CausalLM(copy.deepcopy(apb_model(name).hf).to(dtype), cpu)
    assert model._is_lean == (dtype == torch.float32 or has_fast_bf16(cpu))
    wanted_TM = exact(model, num_rows)
    module_error = (hidden(by_modules(model), num_rows) - wanted_TM).abs().max()
    assert (hidden(model, num_rows) - wanted_TM).abs().max() <= 4 * module_error
    last_TM = wanted_TM.to(dtype)
    logits_TV, module_TV = model.logits(last_TM), by_modules(model).logits(last_TM)
    torch.testing.assert_close(logits_TV.to(dtype), module_TV.to(dtype))
    assert logits_TV.dtype == torch.float32


@pytest.mark.skipif(
    not has_fast_bf16(torch.device("cpu")), reason="this processor has no bf16 instructions"
)
@pytest.mark.parametrize("num_rows", [1, 9])
@pytest.mark.parametrize("name", NAMES)
def test_lean_states_in_bf16_are_as_exact_as_those_of_the_modules(name: str, num_rows: int) -> None:
    model = CausalLM(copy.deepcopy(apb_model(name).hf).bfloat16(), torch.device("cpu"))
    assert model._is_lean
    wanted_TM = exact(model, num_rows)
    module_error = (hidden(by_modules(model), num_rows) - wanted_TM).norm()
    assert (hidden(model, num_rows) - wanted_TM).norm() <= 1.5 * module_error
    states_TM = hidden(model, num_rows)
    assert model.logits(states_TM).dtype == torch.float32
    torch.testing.assert_close(model.logits(states_TM), by_modules(model).logits(states_TM))


def test_many_rows_go_through_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    model = apb_model("llama")
    before = hidden(model, MAX_ROWS + 1)
    monkeypatch.delattr(type(model), "_few_rows")
    assert torch.equal(hidden(model, MAX_ROWS + 1), before)


@pytest.mark.parametrize("needs", [Needs(final=True), Needs(entering=(0, 2))], ids=str)
def test_taps_see_the_same_on_both_ways(needs: Needs) -> None:
    model = apb_model("llama")
    tap = model.tap(needs)
    hidden(model, 7)
    lean = tap.take()
    last_TM = hidden(by_modules(model), 7)
    found = tap.take()
    assert list(lean.rows) == list(found.rows) == list(range(7))
    torch.testing.assert_close(lean.states_TE, found.states_TE)
    if needs.final:
        assert torch.equal(found.states_TE, last_TM)


def test_taps_keep_the_beginning_and_the_end_of_a_long_prompt() -> None:
    model = apb_model("llama")
    tap = model.tap(Needs(final=True, first=3, last=80))
    anchor_len = 15  # a copy of the beginning before the beginning itself
    positions_T = torch.cat((torch.arange(anchor_len), torch.arange(100)))
    last_TM = model.forward(random_ids(115, seed=1), positions_T, attend)
    rows, states_TE = tap.take()
    assert list(rows) == [0, 1, 2, 15, 16, 17, *range(35, 115)]
    assert torch.equal(states_TE, last_TM[list(rows)])


def test_a_tap_ends_with_its_drafter() -> None:
    model = apb_model("llama")
    before = len(model._taps)
    tap = model.tap(Needs(final=True))
    assert len(model._taps) == before + 1
    del tap
    assert len(model._taps) == before
