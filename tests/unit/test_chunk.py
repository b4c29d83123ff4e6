"""Guarantees of running in chunks: the same results, and no module sees more rows at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from apb.attention.base import LayerInputs, Segment
from apb.attention.sdpa import SdpaBackend
from apb.hf.model import CausalLM
from models import NAMES, model_config, random_ids

NUM_ROWS = 29


def attend(layer: LayerInputs) -> Tensor:
    num_rows = layer.q_HTD.shape[1]
    segment = Segment(0, num_rows, layer.k_KTD, layer.v_KTD, causal=True)
    return SdpaBackend().attend(layer.q_HTD, [segment], scale=layer.scale).out_THD


def load(name: str, chunk_len: int) -> CausalLM:
    model = CausalLM.load(
        model_config(name), dtype=torch.float32, device=torch.device("cpu"), chunk_len=chunk_len
    )
    model._is_lean = False  # few rows would pass the modules by
    return model


@contextmanager
def rows_seen(model: CausalLM) -> Iterator[list[int]]:
    """The number of rows in every call of an activation function."""
    seen: list[int] = []

    def note(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(inputs[0].shape[1])

    layers = model._model.base_model.layers
    hooks = [layer.mlp.act_fn.register_forward_hook(note) for layer in layers]
    yield seen
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("chunk_len", [1, 7, NUM_ROWS - 1])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing_but_the_number_of_rows_at_once(name: str, chunk_len: int) -> None:
    ids, positions_T = random_ids(NUM_ROWS, seed=3), torch.arange(NUM_ROWS)
    expected_TM = load(name, NUM_ROWS).forward(ids, positions_T, attend)
    model = load(name, chunk_len)
    with rows_seen(model) as seen:
        found_TM = model.forward(ids, positions_T, attend)
    assert (found_TM - expected_TM).abs().max() < 1e-5
    assert max(seen) <= chunk_len
    assert sum(seen) == NUM_ROWS * model.cache_shape.num_layers
