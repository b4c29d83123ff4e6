"""Guarantees of training retaining heads: labels are the paper's, layers learn as one, runs resume,
and heads that have learnt keep what they had never seen better than chance.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apb.attention.base import LayerInputs, Segment
from apb.attention.sdpa import SdpaBackend
from apb.compress.base import BlockView, Compressor
from apb.compress.random import RandomConfig
from apb.compress.retaining_file import FILE_NAME, RetainingHeads
from apb.compress.retaining_head import RetainingHeadConfig, head_inputs
from apb.errors import InputError
from apb.train import retaining_labels
from apb.train.__main__ import main
from apb.train.pairs import Reading
from apb.train.reading_pass import ReadingPass
from apb.train.recall import Recall, RecallMeter
from apb.train.retaining import HeadRecipe, HeadTrainer
from apb.train.retaining_labels import SHARE, Objective, score_loss
from models import apb_model, hf_model, random_ids
from retaining_heads import target_of, tiny_shape

TARGET = target_of("llama")
RECIPE = HeadRecipe(steps=24, updates=2, hidden=16, learning_rate=3e-3, warm_up=4, save_every=3)


def make_reading(length: int, *, seed: int, answer_len: int = 9) -> Reading:
    """Random tokens, and the same answer behind all of them: there is something to learn."""
    start = length - answer_len
    ids = [*random_ids(start, seed=seed), *random_ids(answer_len, seed=1000)]
    ids_T = torch.tensor(ids, dtype=torch.int32)
    return Reading(ids_T, slice(2, 6), slice(6, start - 4), slice(start, length))


def reading_pass(name: str = "llama") -> ReadingPass:
    return ReadingPass(apb_model(name), SdpaBackend())


def make_trainer(work: Path, recipe: HeadRecipe = RECIPE, *, identity: str = "x") -> HeadTrainer:
    readings = [make_reading(110 + 7 * number, seed=number) for number in range(5)]
    return HeadTrainer(reading_pass(), TARGET, readings, recipe, work=work, identity=identity)


def brute_force_labels(name: str, reading: Reading) -> list[Tensor]:
    """Of every layer, from all n x n logits of transformers' own modules."""
    model = hf_model(name)
    length = len(reading.ids_T)
    config, layers = model.config, list(model.base_model.layers)  # type: ignore[arg-type]
    inputs: list[tuple[Tensor, Tensor]] = []

    def keep(module: torch.nn.Module, args: tuple[()], kwargs: dict[str, Tensor]) -> None:
        inputs.append((kwargs["hidden_states"], kwargs["position_embeddings"]))

    hooks = [layer.self_attn.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    model(input_ids=reading.ids_T[None].long())
    for hook in hooks:
        hook.remove()
    labels = []
    for layer, (hidden_1TM, (cos_1TD, sin_1TD)) in zip(layers, inputs, strict=True):
        attention = layer.self_attn
        rotated = []
        for part in ("q", "k"):
            projected = getattr(attention, f"{part}_proj")(hidden_1TM)[0]
            x_HTD = projected.view(length, -1, config.head_dim)
            x_HTD = getattr(attention, f"{part}_norm", torch.nn.Identity())(x_HTD).transpose(0, 1)
            first, second = x_HTD.chunk(2, dim=-1)
            rotated.append(x_HTD * cos_1TD + torch.cat([-second, first], dim=-1) * sin_1TD)
        q_HTD, k_KTD = rotated
        groups = len(q_HTD) // len(k_KTD)
        logits_HTT = q_HTD @ k_KTD.repeat_interleave(groups, 0).mT * config.head_dim**-0.5
        logits_HTT = logits_HTT.unflatten(0, (-1, groups)).amax(dim=1)
        labels.append(logits_HTT[:, reading.answer, reading.document].amax(dim=1))
    return labels


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_labels_are_those_of_all_logits_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retaining_labels, "_ANSWER_ROWS", 4)
    reading = make_reading(70, seed=1)
    found: list[Tensor] = []
    reading_pass(name).run(reading, lambda view, labels_KS: found.append(labels_KS))
    for labels_KS, expected_KS in zip(found, brute_force_labels(name, reading), strict=True):
        torch.testing.assert_close(labels_KS, expected_KS, rtol=1e-4, atol=1e-4)


def test_the_views_of_a_reading_are_its_documents_rows() -> None:
    reading = make_reading(60, seed=2)
    views: list[BlockView] = []
    reading_pass().run(reading, lambda view, labels_KS: views.append(view))
    layers: list[LayerInputs] = []

    def attend(layer: LayerInputs) -> Tensor:
        layers.append(layer)
        whole = Segment(0, 60, layer.k_KTD, layer.v_KTD, causal=True)
        return SdpaBackend().attend(layer.q_HTD, [whole], scale=layer.scale).out_THD

    apb_model("llama").forward(reading.ids_T.tolist(), torch.arange(60), attend)
    assert len(views) == len(layers) == 3
    for view, layer in zip(views, layers, strict=True):
        assert view.start == 6
        assert torch.equal(view.k_KSD, layer.k_KTD[:, reading.document])
        assert view.query_HWD is not None
        assert torch.equal(view.query_HWD, layer.q_HTD[:, reading.query])


def test_the_loss_is_locrets() -> None:
    """Element by element, of one layer of four."""
    scores_KS, labels_KS = torch.randn(2, 3, 7).unbind()
    distance = smoothness = 0.0
    for head, token in itertools.product(range(3), range(7)):
        gap = abs(float(scores_KS[head, token] - labels_KS[head, token]))
        distance += (0.5 * gap**2 if gap < 1 else gap - 0.5) / 21
        if token:
            step = float(scores_KS[head, token] - scores_KS[head, token - 1])
            smoothness += step**2 / 18
    expected = distance / 4 + 2.5e-3 * smoothness
    assert score_loss(scores_KS, labels_KS, num_layers=4).item() == pytest.approx(expected)


def test_what_is_to_be_kept_is_told_from_the_whole_document() -> None:
    labels_KS = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 5.0, 5.0, 4.0]])
    assert Objective.top.wanted(labels_KS, 2).tolist() == [[0, 1, 0, 1], [1, 1, 0, 0]]
    assert Objective.locret.wanted(labels_KS, 2) is labels_KS


@pytest.mark.parametrize("objective", Objective)
def test_layers_that_learn_one_by_one_learn_as_one(tmp_path: Path, objective: Objective) -> None:
    """The statement: all layers' heads under one optimiser and the sum of their losses."""
    recipe = replace(RECIPE, steps=6, updates=1, loss=objective)
    trainer = make_trainer(tmp_path, recipe)
    begin = trainer.heads(torch.float32).layers
    weights = [weight.clone().requires_grad_() for head in begin for weight in head]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.95))
    for step in range(recipe.steps):
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(
            view: BlockView, labels_KS: Tensor, seen: list[tuple[Tensor, Tensor]] = seen
        ) -> None:
            rows = slice(0, labels_KS.shape[1])
            seen.append((head_inputs(view, TARGET.rotary, rows), labels_KS))

        reading_pass().run(trainer._reading(step), keep)
        losses = []
        for layer, (x_SI, labels_KS) in enumerate(seen):
            fc1_RI, fc2_KR = weights[2 * layer : 2 * layer + 2]
            scores_KS = (F.silu(x_SI.clone() @ fc1_RI.mT) @ fc2_KR.mT).mT
            wanted_KS = objective.wanted(labels_KS, labels_KS.shape[1] // SHARE).clone()
            losses.append(objective.loss(scores_KS, wanted_KS, num_layers=len(seen)))
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        torch.nn.utils.clip_grad_value_(weights, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        optimizer.step()
    trainer.train()
    after = [weight for head in trainer.heads(torch.float32).layers for weight in head]
    for mine, theirs in zip(after, weights, strict=True):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-4, atol=1e-5)


def test_rates_rise_and_fall_in_lines() -> None:
    recipe = HeadRecipe(steps=10, warm_up=4, learning_rate=1.0)
    rates = [recipe.rate(step) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])


def test_an_interrupted_run_ends_as_one_that_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the middle of a pass, when some layers have learnt from it already."""
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    broken = make_trainer(tmp_path / "broken")
    learn, count = broken._learn, itertools.count()

    def fail(view: BlockView, labels_KS: Tensor) -> None:
        if next(count) == 3 * 7 + 2:
            raise KeyboardInterrupt
        learn(view, labels_KS)

    monkeypatch.setattr(broken, "_learn", fail)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    resumed = make_trainer(tmp_path / "broken")
    assert resumed._done == 6
    resumed.train()
    for mine, theirs in zip(
        resumed.heads(torch.float32).layers, whole.heads(torch.float32).layers, strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert resumed.last_loss == whole.last_loss


@pytest.mark.parametrize("change", [{"hidden": 8}, {"loss": Objective.top}, {"seed": 1}])
def test_the_state_of_other_settings_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    make_trainer(tmp_path).train()
    with pytest.raises(InputError, match="other settings"):
        make_trainer(tmp_path, replace(RECIPE, **change))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="other settings"):
        make_trainer(tmp_path, identity="other data")


def held_out_recall(trainer: HeadTrainer) -> dict[str, Recall]:
    trained = RetainingHeadConfig(kernel=1).build(seed=0)
    trained.use(trainer.heads(torch.bfloat16), TARGET)
    meter = RecallMeter({"trained": trained, "random": RandomConfig().build(seed=0)})
    for seed in range(100, 112):
        reading_pass().run(make_reading(180 + seed, seed=seed), meter.observe)
    return meter.recalls()


@pytest.mark.parametrize("objective", Objective)
def test_trained_heads_keep_more_than_chance(tmp_path: Path, objective: Objective) -> None:
    """By four standard errors: answers of a random model are mostly a matter of positions, which
    heads do not see.
    """
    recipe = replace(RECIPE, steps=60, hidden=32, warm_up=6, loss=objective, learning_rate=1e-2)
    trainer = make_trainer(tmp_path, recipe)
    before = held_out_recall(trainer)["trained"]
    losses: list[float] = []
    save = trainer._save

    def kept() -> None:
        losses.append(trainer.last_loss)
        save()

    trainer._save = kept  # type: ignore[method-assign]
    trainer.train()
    after = held_out_recall(trainer)
    trained, chance = after["trained"], after["random"]
    assert losses[-1] < losses[0]
    assert chance.mean == pytest.approx(1 / SHARE, abs=0.03)
    assert trained.mean > chance.mean + 4 * (trained.error + chance.error)
    assert trained.mean > before.mean


class _Known(Compressor):
    """Scores by what it has been told."""

    def __init__(self, scores_of: Callable[[Tensor], Tensor]) -> None:
        self.labels_KS = torch.empty(0)
        self._scores_of = scores_of

    def score(self, block: BlockView) -> Tensor:
        return self._scores_of(self.labels_KS)


def test_recall_is_the_share_of_the_true_top_tokens() -> None:
    best, worst, half = _Known(lambda x: x), _Known(lambda x: -x), _Known(_lower_half)
    meter = RecallMeter({"best": best, "worst": worst, "half": half})
    for document, layer in itertools.product(range(2), range(3)):
        labels_KS = torch.randperm(2 * 80, generator=torch.Generator().manual_seed(layer))
        labels_KS = labels_KS.view(2, 80).float()
        for compressor in (best, worst, half):
            compressor.labels_KS = labels_KS
        empty = torch.empty(2, 80, 4)
        meter.observe(BlockView(layer, document, 0, empty, empty, empty, 1.0), labels_KS)
    recalls = meter.recalls()
    assert recalls["best"].per_layer == (1.0, 1.0, 1.0)
    assert recalls["worst"].per_layer == (0.0, 0.0, 0.0)
    assert recalls["half"].mean == pytest.approx(0.5)
    assert recalls["half"].error == 0.0


def _lower_half(labels_KS: Tensor) -> Tensor:
    """Of the 10 true ones the lower 5, and 5 that are not among them."""
    order = labels_KS.argsort(descending=True).argsort()
    return ((order >= 5) & (order < 15)).float()


def test_the_command_trains_heads_that_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = "The mill of {0} stood by the river until number {0} was drowned in it. "
    text = "".join(sentence.format(f"mill{number}") for number in range(900))
    (tmp_path / "text.txt").write_text(text)
    arguments = ["retaining_heads", "+model=tiny", f"data={tmp_path / 'text.txt'}"]
    arguments += [f"output={tmp_path / 'heads'}", "length=1500", "steps=4", "hidden=8"]
    arguments += ["updates=2", "held_out=2", "loss=top", "learning_rate=0.01", "warm_up=0"]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("retaining_head 0.", "knorm 0.", "random 0."))
    card = (tmp_path / "heads" / "README.md").read_text()
    assert "python -m apb.train retaining_heads" in card
    heads = RetainingHeads.read(tmp_path / "heads", tiny_shape())
    assert (heads.hidden_size, heads.model) == (8, "tiny")
    assert (tmp_path / "heads" / FILE_NAME).is_file()


GOOD = ("retaining_heads", "+model=tiny", "data=pyproject.toml", "output=/nowhere/x")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["retaining_heads", "+model=tiny"], "data= and output= are needed"),
        ([*GOOD, "steps=0"], "steps=0"),
        ([*GOOD, "updates=33"], "updates=33 exceeds 32"),
        ([*GOOD, "loss=best"], "loss=best must be one of locret, top"),
        ([*GOOD, "query_aware=maybe"], "query_aware=maybe must be one of true, false"),
        ([*GOOD, "learning_rate=0"], "learning_rate=0"),
        ([*GOOD, "learning_rate=fast"], "learning_rate=fast"),
        ([*GOOD, "speed=9"], "unknown option speed=9"),
        ([*GOOD, "length=99999999"], "exceeds the 65536 tokens"),
        ([*GOOD, "length=100"], "no usable pair"),
        ([*GOOD, "held_out=500", "length=20000"], "leave none beside held_out=500"),
        (
            ["retaining_heads", "+model=tiny", "data=/nowhere", "output=x"],
            "/nowhere does not exist",
        ),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error.splitlines()[-1]
