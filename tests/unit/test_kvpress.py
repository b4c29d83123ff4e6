"""Scores and kept tokens equal those of NVIDIA's kvpress where the definitions coincide.

The fixture was written by ``tests/fixtures/make_kvpress.py``; its metadata has the versions.
kvpress prunes a cache that is decoded from next, apb chooses what a block passes on, so some things
differ and are left out here or set to be the same:

* `window`, `tova`: kvpress always keeps the observed rows, apb lets them compete. It smooths the
  scores of `window` by a mean, apb by a maximum (the fixture: over one token).
* `expected_attention`: kvpress leaves the first tokens out of the softmax and keeps them (the
  fixture: none); apb has them in and leaves only the queries of a text's first positions out. apb's
  scores are logarithms, of the sum rather than the mean over a group.
* `lag_kv`: kvpress always keeps the last partition (and sinks; the fixture: none) and refuses to
  compress fewer than two partitions; apb compares the last partition with the one before.
* `knorm`, `keydiff`: none.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from apb.attention.selection import top_tokens
from apb.compress.base import BlockView, Compressor, CompressorTarget
from apb.cost import ModelShape
from apb.plugins import PLUGINS
from apb.rotary import Rotary

FIXTURE = Path(__file__).parents[1] / "fixtures" / "kvpress.safetensors"
SETTINGS: dict[str, tuple[str, dict[str, object], int]] = {
    "knorm": ("knorm", {}, 0),
    "keydiff": ("keydiff", {}, 0),
    "tova": ("tova", {}, 1),
    "window": ("window", {"window": 8, "kernel": 1}, 8),
    "expected_attention": ("expected_attention", {"future": 32, "sinks": 0}, 0),
    "expected_mean": ("expected_attention", {"future": 32, "sinks": 0, "covariance": False}, 0),
    "lag_kv": ("lag_kv", {"lag": 32}, 32),
}
"""Name in the fixture: compressor, settings, and how many last tokens kvpress always keeps."""

over_presses = pytest.mark.parametrize("press", SETTINGS)


@pytest.fixture(scope="module")
def kvpress() -> dict[str, Tensor]:
    with safe_open(FIXTURE, framework="pt") as file:
        assert {"kvpress", "transformers", "torch"} <= set(file.metadata())
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def block_of(kvpress: dict[str, Tensor]) -> BlockView:
    q_HSD, k_KSD, v_KSD = (kvpress[name] for name in ("q_HSD", "k_KSD", "v_KSD"))
    return BlockView(
        layer_idx=0,
        block_idx=0,
        start=0,
        q_HSD=q_HSD,
        k_KSD=k_KSD,
        v_KSD=v_KSD,
        scale=q_HSD.shape[-1] ** -0.5,
    )


def compressor_of(press: str, kvpress: dict[str, Tensor]) -> Compressor:
    name, settings, _ = SETTINGS[press]
    (num_heads, _, head_dim), num_kv_heads = kvpress["q_HSD"].shape, len(kvpress["k_KSD"])
    compressor: Compressor = PLUGINS["method/compressor"][name](**settings).build(seed=0)
    shape = ModelShape(2, num_heads * head_dim, 96, num_heads, num_kv_heads, head_dim, 256)
    compressor.attach(
        CompressorTarget(
            model="tiny",
            shape=shape,
            hidden_act="silu",
            rotary=Rotary(kvpress["inv_freq_F"], 1.0),
            device=torch.device("cpu"),
            dtype=torch.float32,
        )
    )
    return compressor


@over_presses
def test_scores_are_those_of_kvpress(press: str, kvpress: dict[str, Tensor]) -> None:
    scores_KS = compressor_of(press, kvpress).score(block_of(kvpress))
    if press.startswith("expected"):
        groups = len(kvpress["q_HSD"]) // len(scores_KS)
        scores_KS = scores_KS.exp() / groups
    compared = slice(0, scores_KS.shape[1] - SETTINGS[press][2])
    expected_KS = kvpress[f"{press}.scores_KS"][:, compared]
    assert expected_KS.std() > 1e-4
    torch.testing.assert_close(scores_KS[:, compared], expected_KS, atol=1e-6, rtol=1e-4)


@over_presses
def test_kept_tokens_are_those_of_kvpress(press: str, kvpress: dict[str, Tensor]) -> None:
    scores_KS = compressor_of(press, kvpress).score(block_of(kvpress))
    kept_KP, always = kvpress[f"{press}.kept_KP"], SETTINGS[press][2]
    found_KP = top_tokens(scores_KS[:, : scores_KS.shape[1] - always], kept_KP.shape[1] - always)
    assert 0 < found_KP.shape[1] < scores_KS.shape[1] // 2
    assert torch.equal(found_KP, kept_KP[:, : kept_KP.shape[1] - always])
