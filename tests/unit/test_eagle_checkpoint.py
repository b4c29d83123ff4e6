"""Guarantees of EAGLE checkpoints: all layouts of one head are one head, and none is guessed at.

Letters: T rows, M hidden size, E width of the target's states, C tokens that a head scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from apb.errors import InputError
from apb.rotary import Rotary
from apb.speculate.eagle3_head import Eagle3Head
from apb.speculate.eagle_checkpoint import EagleCheckpoint
from apb.speculate.eagle_head import Eagle2Head, EagleHead
from apb.speculate.eagle_options import HeadSettings, Origin, RopeSource, TargetFacts
from apb.speculate.eagle_rotary import own_rotary
from eagle_checkpoints import (
    EAGLE2_LAYOUTS,
    EAGLE3_LAYOUTS,
    HEAD_DIM,
    Head,
    eagle2_head,
    eagle3_head,
    eagle31_head,
    with_second_layer,
)
from eagle_oracle import Oracle

HIDDEN, NUM_LAYERS, VOCAB, SCORED, TARGET_THETA = 64, 8, 512, 48, 20_000.0
INV_FREQ_F = 1 / TARGET_THETA ** (torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
TARGET = TargetFacts(
    hidden_size=HIDDEN,
    vocab_size=VOCAB,
    num_layers=NUM_LAYERS,
    rotary=Rotary(INV_FREQ_F, 1.0),
    tokenizer_hash="abc",
)
EAGLE2 = eagle2_head(vocab_size=VOCAB)
EAGLE3 = eagle3_head(vocab_size=VOCAB, num_scored=SCORED)
EAGLE31 = eagle31_head(vocab_size=VOCAB, num_scored=SCORED)
WITH_INPUT_NORM = EAGLE3.adding(**{"input_norm.weight": 1 + 0.2 * torch.randn(3 * HIDDEN)})


def read(head: Head, folder: Path, **settings: Any) -> EagleCheckpoint:
    return EagleCheckpoint.read(head.write(folder), TARGET, HeadSettings(**settings))


def causal(layer_idx: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor) -> Tensor:
    q_1HTD, k_1KTD, v_1KTD = q_HTD[None], k_KTD[None], v_KTD[None]
    return F.scaled_dot_product_attention(q_1HTD, k_1KTD, v_1KTD, is_causal=True, enable_gqa=True)[
        0
    ]


def two_passes(
    head: EagleHead | Oracle, run: Callable[..., tuple[Tensor, Tensor]], num_states: int
) -> Tensor:
    """Inputs of the LM head: of rows with the target's states, then with the head's own."""
    generator = torch.Generator().manual_seed(5)
    embeds_TM = torch.randn(9, HIDDEN, generator=generator).double()
    states_TE = torch.randn(9, num_states * HIDDEN, generator=generator).double()
    states_TM, first_TM = run(embeds_TM, head.combined(states_TE))
    _, second_TM = run(embeds_TM.flip(0), states_TM)
    return torch.cat((first_TM, second_TM))


@torch.no_grad()
def outputs(checkpoint: EagleCheckpoint) -> Tensor:
    head = checkpoint.head.double()

    def run(embeds_TM: Tensor, states_TM: Tensor) -> tuple[Tensor, Tensor]:
        output = head(embeds_TM, states_TM, torch.arange(9), causal)
        return output.states_TM, output.for_logits_TM

    return two_passes(head, run, max(1, len(checkpoint.options.entering.value)))


def stated(head: Head, theta: float, *, feeds_normed: bool = False, **options: bool) -> Tensor:
    """The same by the oracle."""
    oracle, positions = Oracle(head, theta, **options), list(range(9))
    visible_TT = torch.ones(9, 9, dtype=torch.bool).tril()

    def run(embeds_TM: Tensor, states_TM: Tensor) -> tuple[Tensor, Tensor]:
        rows = oracle(embeds_TM, states_TM, positions, visible_TT)
        return rows.normed_TM if feeds_normed else rows.states_TM, rows.normed_TM

    return two_passes(oracle, run, 3 if "lm_head.weight" in head.tensors else 1)


@pytest.mark.parametrize("layout", EAGLE2_LAYOUTS)
def test_eagle2_is_one_head_in_all_layouts(layout: str, tmp_path: Path) -> None:
    checkpoint = read(EAGLE2_LAYOUTS[layout](EAGLE2), tmp_path)
    expected = outputs(read(EAGLE2, tmp_path / "plain"))
    assert isinstance(checkpoint.head, Eagle2Head)
    assert torch.equal(outputs(checkpoint), expected)
    assert checkpoint.ids_C is checkpoint.lm_head_CM is None
    assert checkpoint.options.entering.value == ()


@pytest.mark.parametrize("layout", EAGLE3_LAYOUTS)
def test_eagle3_is_one_head_in_all_layouts(layout: str, tmp_path: Path) -> None:
    checkpoint = read(EAGLE3_LAYOUTS[layout](EAGLE3), tmp_path)
    plain = read(EAGLE3, tmp_path / "plain")
    assert isinstance(checkpoint.head, Eagle3Head)
    assert torch.equal(outputs(checkpoint), outputs(plain))
    assert checkpoint.lm_head_CM is not None
    assert torch.equal(checkpoint.lm_head_CM, EAGLE3.tensors["lm_head.weight"])
    assert checkpoint.ids_C is not None
    assert torch.equal(checkpoint.ids_C, EAGLE3.tensors["t2d"].nonzero().flatten())
    assert checkpoint.options.entering.value == (2, 4, 5)


def test_eagle2_is_the_decoder_layer_without_its_first_norm(tmp_path: Path) -> None:
    torch.testing.assert_close(outputs(read(EAGLE2, tmp_path)), stated(EAGLE2, TARGET_THETA))
    own = read(EAGLE2, tmp_path, rope=RopeSource.own)
    torch.testing.assert_close(outputs(own), stated(EAGLE2, 500.0))


@pytest.mark.parametrize("head", [EAGLE3, EAGLE31, WITH_INPUT_NORM], ids=["3", "3.1", "input_norm"])
@pytest.mark.parametrize("norm_before_residual", [False, True])
def test_eagle3_is_the_decoder_layer_over_normed_pairs(
    head: Head, norm_before_residual: bool, tmp_path: Path
) -> None:
    checkpoint = read(head.configured(norm_before_residual=norm_before_residual), tmp_path)
    feeds_normed = head is EAGLE31
    assert checkpoint.options.norm_output == (
        feeds_normed,
        Origin.checkpoint if feeds_normed else Origin.default,
    )
    expected = stated(
        head, 500.0, feeds_normed=feeds_normed, norm_before_residual=norm_before_residual
    )
    torch.testing.assert_close(outputs(checkpoint), expected)


def test_what_specforge_calls_norm_output_is_not_fed_back(tmp_path: Path) -> None:
    checkpoint = read(EAGLE3_LAYOUTS["specforge"](EAGLE31), tmp_path)
    assert checkpoint.options.norm_output == (False, Origin.default)
    torch.testing.assert_close(outputs(checkpoint), stated(EAGLE31, 500.0))


@pytest.mark.parametrize("head", [EAGLE2, EAGLE3], ids=["2", "3"])
def test_further_layers_are_plain_ones(head: Head, tmp_path: Path) -> None:
    two = with_second_layer(head)
    theta = 500.0 if head is EAGLE3 else TARGET_THETA
    torch.testing.assert_close(outputs(read(two, tmp_path)), stated(two, theta))


def test_options_come_from_the_user_then_the_checkpoint_then_a_default(tmp_path: Path) -> None:
    checkpoint = read(EAGLE3, tmp_path)
    assert str(checkpoint.options) == (
        "rope=own (default), entering=(2, 4, 5) (default), norm_before_residual=False (default), "
        "norm_output=False (default)"
    )
    listed = EAGLE3.configured(
        eagle_aux_hidden_state_layer_ids=[1, 2, 3], norm_before_residual=True
    )
    options = read(listed, tmp_path, norm_before_residual=False).options
    assert options.entering == ((1, 2, 3), Origin.checkpoint)
    assert options.norm_before_residual == (False, Origin.setting)
    assert read(listed, tmp_path, entering=(0, 1, 7)).options.entering.value == (0, 1, 7)


def test_an_id_map_of_all_tokens_in_order_is_none(tmp_path: Path) -> None:
    whole = eagle3_head(vocab_size=VOCAB, num_scored=VOCAB)
    assert read(whole, tmp_path).ids_C is None


def test_ids_may_be_absolute(tmp_path: Path) -> None:
    ids_C = EAGLE3.tensors["t2d"].nonzero().flatten()
    head = EAGLE3.without("d2t", "t2d").adding(hot_token_id=ids_C.to(torch.int32))
    found = read(head, tmp_path).ids_C
    assert found is not None
    assert torch.equal(found, ids_C)


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_theta": 1000.0},
        {"rope_theta": 1000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
        {
            "rope_theta": 500_000.0,
            "max_position_embeddings": 131072,
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        {
            "rope_theta": 150_000.0,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 4.0,
                "mscale": 1.2,
                "mscale_all_dim": 0.7,
                "original_max_position_embeddings": 4096,
            },
        },
    ],
    ids=["default", "linear", "llama3", "yarn", "yarn-mscale"],
)
def test_own_rotary_is_that_of_transformers(settings: dict[str, Any]) -> None:
    rotary = own_rotary(settings, 64)
    config = LlamaConfig(head_dim=64, **json.loads(json.dumps(settings)))
    assert config.rope_parameters is not None
    kind = str(config.rope_parameters["rope_type"])
    if kind == "default":
        inv_freq_F, scaling = 1 / 1000.0 ** (torch.arange(0, 64, 2) / 64), 1.0
    else:
        inv_freq_F, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    torch.testing.assert_close(rotary.inv_freq_F, inv_freq_F)
    assert math.isclose(rotary.scaling, scaling)


def _rows(tensor: str, count: int) -> Callable[[Head], Head]:
    return lambda head: head.adding(**{tensor: head.tensors[tensor][:count].clone()})


def _shifted(head: Head) -> Head:
    return head.adding(d2t=head.tensors["d2t"] + 1)


def _repeated(head: Head) -> Head:
    offsets_C = head.tensors["d2t"].clone()
    offsets_C[1] = offsets_C[0] - 1
    return head.adding(d2t=offsets_C).without("t2d")


BAD: dict[str, tuple[Head, str]] = {
    "hidden size": (
        eagle2_head(hidden_size=32, vocab_size=VOCAB),
        r"tensor fc.weight is \[32, 64\], which does not fit hidden size 64",
    ),
    "states": (
        eagle3_head(hidden_size=96, vocab_size=VOCAB, num_scored=SCORED, num_states=1),
        r"tensor fc.weight is \[96, 96\], which does not fit hidden size 64",
    ),
    "tables": (
        eagle3_head(hidden_size=96, vocab_size=VOCAB, num_scored=SCORED, num_states=2),
        "no tensor embed_tokens.weight, and the model's cannot stand in",
    ),
    "vocabulary": (eagle2_head(vocab_size=VOCAB + 1), "vocabulary 513, and this one has 512"),
    "tokenizer": (EAGLE2.configured(tokenizer_hash="xyz"), "another tokenizer"),
    "missing": (
        EAGLE2.without("layers.0.mlp.down_proj.weight"),
        r"no tensor layers.0.mlp.down_proj.weight \[64, 96\]",
    ),
    "unknown": (
        EAGLE2.adding(**{"layers.0.input_layernorm.weight": torch.ones(64)}),
        "EAGLE-2 head but has tensor layers.0.input_layernorm.weight",
    ),
    "shape": (
        _rows("layers.0.self_attn.k_proj.weight", 16)(EAGLE2),
        r"layers.0.self_attn.k_proj.weight is \[16, 64\] instead of \[32, 64\]",
    ),
    "heads": (EAGLE2.configured(num_attention_heads=3), "num_attention_heads=3"),
    "no heads": (EAGLE2.configured(num_attention_heads=None), "num_attention_heads=None"),
    "activation": (EAGLE2.configured(hidden_act="gelu"), "'gelu'"),
    "no head": (EAGLE2.without("fc.weight"), "no EAGLE head: it has no tensor fc.weight"),
    "twice": (
        EAGLE3.adding(**{"layers.0.hidden_norm.weight": torch.ones(64)}),
        "layers.0.hidden_norm.weight twice",
    ),
    "quantised": (
        EAGLE2.adding(**{"fc.weight": torch.ones(64, 128, dtype=torch.int8)}),
        "fc.weight holds torch.int8",
    ),
    "P-EAGLE": (EAGLE3.adding(mask_hidden=torch.ones(1, 1, 192)), "P-EAGLE"),
    "DFlash": (EAGLE3.configured(mask_token_id=3, block_size=8), "DFlash"),
    "ids out of range": (_shifted(eagle3_head(vocab_size=VOCAB, num_scored=VOCAB)), "1 to 512"),
    "ids twice": (_repeated(EAGLE3), "48 tokens to 47 ids"),
    "ids contradict": (_shifted(EAGLE3), "its t2d marks 48 ids"),
    "LM head": (_rows("lm_head.weight", 47)(EAGLE3), "lm_head.weight has 47 rows instead of 48"),
    "LM head without ids": (EAGLE3.without("d2t", "t2d"), "48 rows instead of 512"),
    "layers": (
        EAGLE3.configured(eagle_aux_hidden_state_layer_ids=[1, 2]),
        r"3 of 8 layers, and the checkpoint says \[1, 2\]: set drafter.entering",
    ),
    "layers out of order": (
        EAGLE3.configured(eagle_aux_hidden_state_layer_ids=[5, 2, 4]),
        "ascending order",
    ),
    "last layer": (
        EAGLE3.configured(eagle_config={"eagle_aux_hidden_state_layer_ids": [1, 2, 7]}),
        r"\[2, 3, 8\]",
    ),
    "RoPE": (EAGLE3.configured(rope_scaling={"type": "dynamic", "factor": 2.0}), "'dynamic' RoPE"),
    "RoPE incomplete": (EAGLE3.configured(rope_scaling={"type": "linear"}), "incomplete"),
    "partial RoPE": (EAGLE3.configured(partial_rotary_factor=0.5), "RoPE on 0.5 of each head"),
}


@pytest.mark.parametrize("case", BAD)
def test_heads_that_do_not_fit_are_refused_in_one_sentence(case: str, tmp_path: Path) -> None:
    head, words = BAD[case]
    with pytest.raises(InputError, match=words) as caught:
        read(head, tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert ". " not in message.replace(str(tmp_path), "")


def test_another_head_size_needs_the_head_s_own_rotary_embedding(tmp_path: Path) -> None:
    wide = EAGLE2.configured(num_attention_heads=2, num_key_value_heads=1)
    with pytest.raises(InputError, match=r"heads of size 32.*drafter.rope=own"):
        read(wide, tmp_path)
    assert read(wide, tmp_path, rope=RopeSource.own).head.shape.head_dim == 32


class _Runs:
    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a checkpoint ran code",)


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("how", ["cut", "text", "empty"])
def test_damaged_files_are_named(file: str, how: str, tmp_path: Path) -> None:
    Head(EAGLE2.tensors, EAGLE2.config, file).write(tmp_path)
    path = tmp_path / file
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "text": b"hello", "empty": b""}[how])
    with pytest.raises(InputError, match=rf"{file}.*truncated"):
        EagleCheckpoint.read(tmp_path, TARGET)


def test_pickles_do_not_run_code(tmp_path: Path) -> None:
    Head({}, EAGLE2.config).write(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"fc.weight": _Runs()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="could run code"):
        EagleCheckpoint.read(tmp_path, TARGET)
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="other than named tensors"):
        EagleCheckpoint.read(tmp_path, TARGET)


def test_folders_that_hold_no_head_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        EagleCheckpoint.read(tmp_path / "absent", TARGET)
    with pytest.raises(InputError, match="no weights"):
        EagleCheckpoint.read(tmp_path, TARGET)
    safetensors.torch.save_file(EAGLE2.tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"no config\.json"):
        EagleCheckpoint.read(tmp_path, TARGET)
    for text, words in (("{", "cannot be read as JSON"), ("[]", "no JSON object")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(InputError, match=words):
            EagleCheckpoint.read(tmp_path, TARGET)


def test_weights_in_several_files_are_one_head(tmp_path: Path) -> None:
    names = sorted(EAGLE2.tensors)
    for part, chosen in enumerate((names[:4], names[4:])):
        tensors = {name: EAGLE2.tensors[name] for name in chosen}
        Head(tensors, EAGLE2.config, f"model-{part}.safetensors").write(tmp_path)
    whole = outputs(read(EAGLE2, tmp_path / "whole"))
    assert torch.equal(outputs(EagleCheckpoint.read(tmp_path, TARGET)), whole)
