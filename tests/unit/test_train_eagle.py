"""Guarantees of training heads: unrolled drafts are those of drafting, runs resume, heads learn."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from apb.attention.sdpa import SdpaConfig
from apb.config import compose_config
from apb.errors import InputError
from apb.hf.model import CausalLM
from apb.rotary import Rotary
from apb.speculate.eagle_head import Eagle2Head, EagleHead, HeadShape
from apb.train.__main__ import main
from apb.train.eagle import EagleTrainer, HeldOut, Recipe, Teacher
from apb.train.eagle_command import new_head
from apb.train.features import FeatureFolder, Features, FeatureSpec, compute_features
from apb.train.lessons import Lesson
from apb.train.unroll import drafted_rows, drafted_states

SHAPE = HeadShape(
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    state_sizes=(16,),
)
SPEC = FeatureSpec("random", "", ("nothing",), (), lessons=12, length=9, hidden_size=16, seed=0)
RECIPE = Recipe(steps=6, batch=2, held_out=4, save_every=2, warm_up=2)


def make_head(shape: HeadShape = SHAPE) -> Eagle2Head:
    torch.manual_seed(0)
    return Eagle2Head(shape, Rotary(torch.tensor([1.0, 0.1]), 1.0))


def drafted_alone(head: EagleHead, embeds_TM: Tensor, states_TM: Tensor, start: int) -> Tensor:
    """A draft that begins behind row `start`: one row after the other, all seen, no masks."""
    seen: list[tuple[Tensor, Tensor]] = []

    def attend(layer_idx: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor) -> Tensor:
        seen.append((k_KTD, v_KTD))
        k_HSD, v_HSD = (
            torch.cat(x, dim=1).repeat_interleave(2, dim=0) for x in zip(*seen, strict=True)
        )
        return (q_HTD @ k_HSD.mT / 2.0).softmax(-1) @ v_HSD

    outputs: list[Tensor] = []
    for row in range(len(embeds_TM)):
        state_1M = states_TM[row : row + 1] if row <= start else outputs[-1]
        outputs.append(
            head(embeds_TM[row : row + 1], state_1M, torch.tensor([row]), attend).states_TM
        )
    return torch.cat(outputs)


@torch.inference_mode()
def test_unrolled_drafts_are_those_of_drafting_row_by_row() -> None:
    head = make_head()
    embeds_TM, states_TM = torch.randn(2, 8, 16).unbind()
    unrolled = list(drafted_states(head, embeds_TM[None], states_TM[None], steps=4))
    for start in range(8):
        alone_TM = drafted_alone(head, embeds_TM, states_TM, start)
        for step in range(min(4, 8 - start)):
            torch.testing.assert_close(unrolled[step][0, start + step], alone_TM[start + step])


def make_features(folder: Path) -> FeatureFolder:
    generator = torch.Generator().manual_seed(0)
    features = FeatureFolder(folder, SPEC)
    while len(features) < SPEC.lessons:
        tokens_NL = torch.randint(0, 50, (4, 9), generator=generator)
        spans_N2 = torch.tensor([(0, 9), (3, 9), (2, 7), (5, 8)])
        features.append(tokens_NL, spans_N2, torch.randn(4, 9, 16, generator=generator))
    return features


def make_trainer(
    folder: Path,
    recipe: Recipe = RECIPE,
    *,
    scored: Sequence[int] = range(20),
    shape: HeadShape = SHAPE,
) -> EagleTrainer:
    generator = torch.Generator().manual_seed(1)
    table_VM = torch.randn(50, 16, generator=generator)
    teacher = Teacher.of(table_VM, table_VM, torch.tensor(scored))
    return EagleTrainer(make_head(shape), teacher, make_features(folder), recipe, folder)


def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    broken = make_trainer(tmp_path / "broken")
    loss, count = broken._loss, iter(range(100))

    def fail(lessons: Features) -> tuple[Tensor, str]:
        if next(count) == 5:
            raise KeyboardInterrupt
        return loss(lessons)

    monkeypatch.setattr(broken, "_loss", fail)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken")
    resumed.train()
    for name, weight in whole.head.state_dict().items():
        torch.testing.assert_close(resumed.head.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    "other",
    [
        {"recipe": replace(RECIPE, batch=3)},
        {"scored": range(21)},
        {"scored": range(1, 21)},
        {"shape": replace(SHAPE, intermediate_size=25)},
        {"shape": replace(SHAPE, norm_eps=1e-5)},
    ],
    ids=str,
)
def test_the_state_of_another_training_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    make_trainer(tmp_path).train()
    make_trainer(tmp_path)
    with pytest.raises(InputError, match="other settings"):
        make_trainer(tmp_path, **other)


def test_what_is_trained_is_on_the_targets_device() -> None:
    """Shown on a device without memory, where nothing from the CPU may be mixed in either."""
    meta = torch.device("meta")
    weight_VM = torch.empty(50, 16, device=meta)
    teacher = Teacher.of(weight_VM, weight_VM, torch.arange(20))
    assert {x.device for x in (*begun_head(meta).parameters(), *teacher)} == {meta}


def test_a_head_begins_near_the_state_that_it_is_given() -> None:
    torch.manual_seed(0)
    drawn_MX = Eagle2Head(SHAPE, Rotary(torch.empty(2), 1.0)).fc.weight
    torch.manual_seed(0)
    added_MX = begun_head(torch.device("cpu")).fc.weight - drawn_MX
    torch.testing.assert_close(added_MX, torch.cat((torch.zeros(16, 16), torch.eye(16)), dim=1))


def begun_head(device: torch.device) -> Eagle2Head:
    target: Any = SimpleNamespace(device=device, rotary=Rotary(torch.empty(2, device=device), 1.0))
    settings = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rms_norm_eps": 1e-6,
    }
    return new_head(target, settings)


def test_features_that_were_half_written_are_written_again(tmp_path: Path) -> None:
    features = make_features(tmp_path)
    tokens_NL, _, states_NLM = features.read(range(12))
    with (tmp_path / "tokens.i32").open("ab") as file:
        file.write(b"half")
    assert len(features) == 12
    features.append(tokens_NL[:1], torch.tensor([[2, 4]]), states_NLM[:1])
    again = features.read(range(13))
    assert torch.equal(again.tokens_NL, torch.cat([tokens_NL, tokens_NL[:1]]))
    assert again.drafted_NL[-1].nonzero().flatten().tolist() == [2, 3]
    with pytest.raises(InputError, match="other settings"):
        FeatureFolder(tmp_path, replace(SPEC, seed=1))


def test_the_rows_that_count_tell_a_token_that_is_to_be_drafted() -> None:
    drafted_BL = torch.rand(5, 12) < 0.5
    for depth in range(4):
        rows_BT = drafted_rows(drafted_BL, depth)
        for text in range(5):
            counting = [t for t in range(depth, 11) if t + 2 < 12 and drafted_BL[text, t + 2]]
            assert rows_BT[text].nonzero().flatten().tolist() == counting


def test_padding_teaches_nothing(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    lessons = trainer._features.read([2])  # whose tokens from 7 on are padding
    other = Features(*(value.clone() for value in lessons))
    other.tokens_NL[:, 7:] = 1
    other.states_NLM[:, 7:] = 9.0
    assert trainer._loss(other)[0] == trainer._loss(lessons)[0]
    other.states_NLM[:, 5] = 9.0  # tells token 6
    assert trainer._loss(other)[0] != trainer._loss(lessons)[0]


@torch.inference_mode()
def test_the_end_of_a_long_lesson_is_kept_with_the_states_of_the_whole(tmp_path: Path) -> None:
    model = CausalLM.load(
        compose_config(["model=tiny"]).model, dtype=torch.float32, device=torch.device("cpu")
    )
    long, short = list(range(40, 70)), list(range(9))
    spec = replace(SPEC, lessons=2, length=12, hidden_size=model.hf.config.hidden_size)
    folder = FeatureFolder(tmp_path, spec)
    backend = SdpaConfig().build(model.attention_target)
    compute_features(folder, model, backend, iter([Lesson(long, 25), Lesson(short, 4)]))
    found = folder.read([0, 1])
    assert found.tokens_NL.tolist() == [long[-12:], [*short, 0, 0, 0]]
    drafted = [row.nonzero().flatten().tolist() for row in found.drafted_NL]
    assert drafted == [list(range(7, 12)), list(range(4, 9))]
    model.hf.set_attn_implementation("sdpa")
    for row, (ids, kept) in enumerate(((long, 12), (short, 9))):
        wanted_1TM = model.hf.base_model(torch.tensor([ids])).last_hidden_state
        torch.testing.assert_close(
            found.states_NLM[row, :kept], wanted_1TM[0, -kept:], atol=2e-2, rtol=1e-2
        )  # bf16 on the disk


def test_acceptance_of_a_chain() -> None:
    assert HeldOut((0.5, 0.5)).acceptance_length == 1.75


def test_the_command_trains_a_head_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text that repeats itself: what the head has learnt shows on lessons it has not seen."""
    (tmp_path / "text.txt").write_text("the same words again and again, " * 400)
    arguments = [
        *("eagle", "+model=tiny", f"data={tmp_path / 'text.txt'}", f"output={tmp_path / 'head'}"),
        *("lessons=24", "length=64", "held_out=4", "batch=4"),
    ]
    shares = []
    for steps in (1, 60):
        assert main([*arguments, f"steps={steps}", f"work={tmp_path / str(steps)}"]) == 0
        shares.append(float(capsys.readouterr().out.split("by depth ")[1].split(",")[0]))
    assert shares[1] > shares[0]
    assert json.loads((tmp_path / "head" / "config.json").read_text())["tokenizer_hash"]
    assert "python -m apb.train eagle" in (tmp_path / "head" / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "say what to train"),
        (["eagle", "+model=tiny"], "output= and data= or generations= are needed"),
        (["eagle", "+model=tiny", "data=/nowhere", "output=x"], "data=/nowhere does not exist"),
        (["eagle", "+model=tiny", "data=.", "output=x", "steps=0"], "steps=0"),
        (["eagle", "+model=tiny", "data=.", "output=x", "speed=9"], "unknown option speed=9"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert words in capsys.readouterr().err
