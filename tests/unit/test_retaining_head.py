"""Guarantees of the retaining-head compressor: it reads what RoPE got, and scores as published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apb.attention.base import LayerInputs, Segment
from apb.attention.sdpa import SdpaBackend
from apb.attention.selection import max_pool, top_tokens
from apb.compress import retaining_head
from apb.compress.base import BlockView
from apb.compress.retaining_file import RetainingHead, RetainingHeads
from apb.compress.retaining_head import (
    RetainingHeadCompressor,
    RetainingHeadConfig,
    head_inputs,
)
from apb.errors import InputError
from models import NAMES, apb_model, random_ids
from retaining_heads import random_heads, target_of

TARGET = target_of("llama")
HEADS = random_heads(TARGET.shape, hidden_size=12)
START = 37


def make_compressor(heads: RetainingHeads = HEADS, *, kernel: int = 5) -> RetainingHeadCompressor:
    compressor = RetainingHeadConfig(kernel=kernel).build(seed=0)
    compressor.use(heads, TARGET)
    return compressor


def draw_block(num_tokens: int, *, layer_idx: int = 1) -> BlockView:
    shape = TARGET.shape
    q_HSD = torch.randn(shape.num_heads, num_tokens, shape.head_dim)
    k_KSD, v_KSD = torch.randn(2, shape.num_kv_heads, num_tokens, shape.head_dim).unbind()
    return BlockView(layer_idx, 1, START, q_HSD, k_KSD, v_KSD, scale=0.25)


def projections(name: str, ids: tuple[int, ...]) -> tuple[list[BlockView], list[Tensor]]:
    """Of every layer, what a compressor sees of a pass, and what the projections (and the norms
    behind them) gave, token by token.
    """
    model = apb_model(name)
    views: list[BlockView] = []
    given: list[dict[str, Tensor]] = []
    hooks = []

    def keep(layer: dict[str, Tensor], part: str) -> Any:
        def hook(module: Any, args: Any, output: Tensor) -> None:
            layer[part] = output[0].flatten(1)

        return hook

    for layer in model.hf.base_model.layers:
        given.append({})
        for part in ("q", "k", "v"):
            module = getattr(layer.self_attn, f"{part}_norm", None)
            module = module or getattr(layer.self_attn, f"{part}_proj")
            hooks.append(module.register_forward_hook(keep(given[-1], part)))

    def attend(layer: LayerInputs) -> Tensor:
        views.append(BlockView(layer.layer_idx, 0, START, *layer[1:]))
        whole = Segment(0, len(ids), layer.k_KTD, layer.v_KTD, causal=True)
        return SdpaBackend().attend(layer.q_HTD, [whole], scale=layer.scale).out_THD

    model.forward(ids, torch.arange(START, START + len(ids)), attend)
    for hook in hooks:
        hook.remove()
    return views, [torch.cat([layer[part] for part in "qkv"], dim=-1) for layer in given]


@pytest.mark.parametrize("name", NAMES)
def test_heads_read_the_projections_before_rope(name: str) -> None:
    """With biases (Qwen2), and behind the norms of q and k where the model has them (Qwen3)."""
    views, expected = projections(name, random_ids(150, seed=3))
    for view, expected_TI in zip(views, expected, strict=True):
        x_TI = head_inputs(view, target_of(name).rotary, slice(0, 150))
        torch.testing.assert_close(x_TI, expected_TI, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("act", ["silu", "gelu", "relu"])
def test_scores_are_those_of_the_published_network(act: str) -> None:
    block = draw_block(45)
    compressor = make_compressor(replace(HEADS, activation=act))
    q_HSD, k_KSD = block.before_rope(TARGET.rotary)
    activations = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
    for token in range(45):
        x_I = torch.cat([x[:, token].flatten() for x in (q_HSD, k_KSD, block.v_KSD)])
        fc1_RI, fc2_KR = HEADS.layers[1]
        expected_K = fc2_KR @ activations[act](fc1_RI @ x_I)
        torch.testing.assert_close(compressor.score(block)[:, token], expected_K)


def test_scores_do_not_depend_on_how_many_rows_are_scored_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    block = draw_block(45)
    whole_KS = make_compressor().score(block)
    monkeypatch.setattr(retaining_head, "_ROWS", 7)
    torch.testing.assert_close(make_compressor().score(block), whole_KS)


@pytest.mark.parametrize("kernel", [1, 5])
@pytest.mark.parametrize("excluded", [0, 1, 9, 30])
def test_barred_tokens_are_pooled_as_if_all_were_scored(kernel: int, excluded: int) -> None:
    block, compressor = draw_block(45), make_compressor(kernel=kernel)
    out_P2KD = torch.empty(8, 2, TARGET.shape.num_kv_heads, TARGET.shape.head_dim)
    kept_KP = compressor.select(block, out_P2KD, backend=SdpaBackend(), excluded=excluded)
    scores_KS = max_pool(compressor.score(block), kernel)[:, excluded:]
    expected_KP = top_tokens(scores_KS, 8) + excluded
    assert torch.equal(kept_KP, expected_KP)
    for head, kept_P in enumerate(kept_KP):
        assert torch.equal(out_P2KD[:, 0, head], block.k_KSD[head, kept_P])
        assert torch.equal(out_P2KD[:, 1, head], block.v_KSD[head, kept_P])


def test_barred_tokens_are_not_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    block, compressor = draw_block(45), make_compressor()
    seen: list[int] = []
    score = compressor.score

    def counted(view: BlockView) -> Tensor:
        seen.append(view.k_KSD.shape[1])
        return score(view)

    monkeypatch.setattr(compressor, "score", counted)
    out_P2KD = torch.empty(8, 2, TARGET.shape.num_kv_heads, TARGET.shape.head_dim)
    compressor.select(block, out_P2KD, backend=SdpaBackend(), excluded=30)
    assert seen == [45 - 30 + 2]


def test_heads_are_found_by_setting_or_among_what_is_shipped(tmp_path: Path) -> None:
    HEADS.write(tmp_path / "retaining_heads.safetensors")
    block = draw_block(20)
    expected_KS = make_compressor().score(block)
    shipped = RetainingHeadConfig().build(seed=0)
    shipped.attach(replace(TARGET, shipped=tmp_path))
    named = RetainingHeadConfig(heads=str(tmp_path)).build(seed=0)
    named.attach(TARGET)
    assert torch.equal(shipped.score(block), expected_KS)
    assert torch.equal(named.score(block), expected_KS)


def test_heads_take_the_models_dtype_and_scores_are_fp32() -> None:
    compressor = RetainingHeadConfig().build(seed=0)
    compressor.use(HEADS, replace(TARGET, dtype=torch.bfloat16))
    block = draw_block(45)
    scores_KS = compressor.score(block)
    assert scores_KS.dtype == torch.float32
    assert not torch.equal(scores_KS, scores_KS.bfloat16().float())
    error = (scores_KS - make_compressor().score(block)).abs().max()
    assert 0 < error < 0.05 * scores_KS.abs().max()


def test_without_heads_is_one_sentence(tmp_path: Path) -> None:
    for shipped in (None, tmp_path):
        with pytest.raises(InputError, match="ships no retaining heads for llama: set"):
            RetainingHeadConfig().build(seed=0).attach(replace(TARGET, shipped=shipped))


def test_an_activation_that_is_not_known_is_refused() -> None:
    with pytest.raises(InputError, match="activation 'tanh'"):
        make_compressor(replace(HEADS, activation="tanh"))


@pytest.mark.parametrize("kernel", [0, 4, -1])
def test_a_pooling_width_that_is_not_odd_is_refused(kernel: int) -> None:
    with pytest.raises(InputError, match="must be odd"):
        RetainingHeadConfig(kernel=kernel)


def test_heads_of_another_models_name_are_only_noted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="apb"):
        make_compressor(replace(HEADS, model="llama"))
        assert not caplog.records
        make_compressor(replace(HEADS, model="other"))
    assert "made for other" in caplog.text


def test_permuted_kv_heads_score_permuted() -> None:
    """Where the weights are permuted with them."""
    shape, block = TARGET.shape, draw_block(30)
    order = torch.tensor([1, 0])
    sizes = [heads * shape.head_dim for heads in (shape.num_heads, *[shape.num_kv_heads] * 2)]

    def permuted(x_HX: Tensor) -> Tensor:
        permuted_HX: Tensor = x_HX.unflatten(0, (shape.num_kv_heads, -1))[order].flatten(0, 1)
        return permuted_HX

    def permuted_head(head: RetainingHead) -> RetainingHead:
        parts = [permuted(part.T).T for part in head.fc1_RI.split(sizes, dim=1)]
        return RetainingHead(torch.cat(parts, dim=1), head.fc2_KR[order])

    other = block._replace(
        q_HSD=permuted(block.q_HSD), k_KSD=block.k_KSD[order], v_KSD=block.v_KSD[order]
    )
    heads = RetainingHeads(tuple(map(permuted_head, HEADS.layers)))
    expected_KS = make_compressor().score(block)[order]
    torch.testing.assert_close(make_compressor(heads).score(other), expected_KS)
