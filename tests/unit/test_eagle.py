"""Guarantees of EAGLE drafts: those of a plain recomputation, whatever is cached or dropped.

Letters: T rows, M hidden size, E width of the target's states, V vocabulary, C tokens that are
scored, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from apb.errors import InputError
from apb.packed import has_fast_bf16
from apb.sampling import SamplingParams
from apb.speculate.base import DraftRequest, Verified
from apb.speculate.eagle import EagleConfig, EagleDrafter
from apb.speculate.eagle_cache import Window, WindowedCache
from apb.speculate.eagle_head import HeadShape
from apb.speculate.frspec import FrSpecConfig
from apb.speculate.tree import DraftTree, TreeBuilder
from eagle_checkpoints import Head, eagle2_head, eagle3_head, eagle31_head, with_second_layer
from eagle_oracle import Oracle
from models import VOCAB, draft_target, hf_model, random_ids

TARGET = draft_target("llama")
HIDDEN, NUM_LAYERS, DEPTH, TOPK, MAX_NODES = 64, 3, 4, 3, 12
EAGLE2 = eagle2_head(vocab_size=VOCAB)
EAGLE3 = eagle3_head(vocab_size=VOCAB, num_scored=60)
DEEP = "two layers"
HEADS = {
    "eagle2": EAGLE2,
    "eagle3": EAGLE3,
    "eagle31": eagle31_head(vocab_size=VOCAB, num_scored=60),
    DEEP: with_second_layer(EAGLE3),
    "own embedding": EAGLE2.adding(
        **{"embed_tokens.weight": torch.randn(VOCAB, HIDDEN, generator=torch.manual_seed(2))}
    ),
}
PROMPT = random_ids(14, seed=1)

UNLIMITED = Window(4, 1024)

over_heads = pytest.mark.parametrize("name", HEADS)


def config_of(name: str, folder: Path, **settings: Any) -> EagleConfig:
    head = HEADS[name]
    entering = [0, 1, 2] if "norm.weight" in head.tensors else None
    path = str(head.write(folder / name))
    return EagleConfig(
        **{"head": path, "entering": entering, "depth": DEPTH, "topk": TOPK, "min_chance": 0.0}
        | settings
    )


class Pair(NamedTuple):
    """A token, and the target's state of the one before it."""

    position: int
    token_id: int
    state_E: Tensor


@dataclass
class Plain:
    """The tree of EAGLE-2 by brute force: each node by a pass over the whole text and its path."""

    head: Head
    window: Window = UNLIMITED
    scored: Sequence[int] | None = None
    min_chance: float = 0.0
    pairs: list[Pair] = field(default_factory=list)

    def __post_init__(self) -> None:
        tensors = self.head.tensors
        is_eagle3 = "norm.weight" in tensors
        theta = 500.0 if is_eagle3 else hf_model("llama").config.rope_parameters["rope_theta"]
        self._oracle = Oracle(self.head, theta)
        self._feeds_normed = bool(self.head.config.get("norm_output"))
        self._embedding_VM = tensors.get("embed_tokens.weight", TARGET.embedding()).double()
        lm_head_CM = tensors.get("lm_head.weight", TARGET.head()).double()
        ids_C = tensors["t2d"].nonzero().flatten() if is_eagle3 else torch.arange(VOCAB)
        if self.scored is not None:
            ids_C = torch.tensor(sorted(self.scored))
            lm_head_CM = lm_head_CM[ids_C]
        self._lm_head_CM, self._ids = lm_head_CM, ids_C.tolist()

    def tree(self, root: int, *, max_nodes: int = MAX_NODES) -> DraftTree:
        self._known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        considered: list[tuple[float, tuple[int, ...]]] = []
        beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
        for _ in range(DEPTH):
            if math.exp(beam[0][0]) < self.min_chance:
                break
            level = [
                (score + logprob, (*path, token_id))
                for score, path in beam
                for logprob, token_id in self._likeliest(path)
            ]
            considered += level
            beam = sorted(level, key=lambda node: -node[0])[:TOPK]
        builder = TreeBuilder(root, max_nodes=max_nodes)
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for _, path in sorted(considered, key=lambda node: -node[0])[: max_nodes - 1]:
            node = builder.add(nodes[path[:-1]], path[-1], source=1)
            assert node is not None
            nodes[path] = node
        return builder.build()

    def _likeliest(self, path: tuple[int, ...]) -> list[tuple[float, int]]:
        logprobs_C = self._after(path)[1]
        best = logprobs_C.topk(TOPK)
        return [
            (logprob, self._ids[index])
            for logprob, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def _after(self, path: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """The state that is fed back behind a path, and the log-probabilities of its children."""
        if path not in self._known:
            drafted = [self._after(path[:length])[0] for length in range(len(path))]
            text_TE = torch.stack([pair.state_E for pair in self.pairs]).double()
            states_TM = torch.cat((self._oracle.combined(text_TE), *(s[None] for s in drafted)))
            ids = torch.tensor([*(pair.token_id for pair in self.pairs), *path])
            last = self.pairs[-1].position
            positions = [
                *(pair.position for pair in self.pairs),
                *range(last + 1, last + 1 + len(path)),
            ]
            rows = self._oracle(
                self._embedding_VM[ids], states_TM, positions, self._visible(positions)
            )
            fed_TM = rows.normed_TM if self._feeds_normed else rows.states_TM
            logits_C = rows.normed_TM[-1] @ self._lm_head_CM.T
            self._known[path] = fed_TM[-1], logits_C.log_softmax(dim=-1)
        return self._known[path]

    def _visible(self, positions: Sequence[int]) -> Tensor:
        sinks, length = self.window
        return torch.tensor(
            [[k <= q and (k < sinks or q - k < length) for k in positions] for q in positions]
        )


class Dialogue:
    """A target that accepts what it likes, seen by a drafter and by the plain recomputation."""

    def __init__(self, drafter: EagleDrafter, plain: Plain, prompt: Sequence[int] = PROMPT) -> None:
        self.drafter, self.plain, self.tokens = drafter, plain, list(prompt)
        self._rng, self._generator = random.Random(0), torch.Generator().manual_seed(0)
        self._width = HIDDEN * (NUM_LAYERS if "norm.weight" in plain.head.tensors else 1)
        drafter.begin(DraftRequest(prompt, SamplingParams()))
        states_TE = self._states(len(prompt))
        middle = len(prompt) // 2
        for rows in (range(middle), range(middle, len(prompt))):
            drafter.read(rows, states_TE[rows.start : rows.stop])
        first = self._token()
        drafter.observe([first], None)
        self.tokens.append(first)
        plain.pairs += [Pair(i, self.tokens[i + 1], state_E) for i, state_E in enumerate(states_TE)]

    def _states(self, count: int) -> Tensor:
        return torch.randn(count, self._width, generator=self._generator)

    def _token(self) -> int:
        return self._rng.randrange(VOCAB)

    def drafted(self, *, max_nodes: int = MAX_NODES) -> DraftTree:
        builder = TreeBuilder(self.tokens[-1], max_nodes=max_nodes)
        self.drafter.extend_tree(builder, source=1)
        return builder.build()

    def step(self) -> DraftTree:
        """Draft, and accept a path that is as good as any."""
        tree, path = self.drafted(), [0]
        while (children := list(tree.children(path[-1]))) and self._rng.random() < 0.8:
            path.append(self._rng.choice(children))
        self._verify(tree, tuple(path))
        return tree

    def undrafted_step(self) -> None:
        self._verify(DraftTree.of_root(self.tokens[-1]), (0,))

    def _verify(self, tree: DraftTree, path: tuple[int, ...]) -> None:
        new_ids = (*(tree.tokens[node] for node in path[1:]), self._token())
        states_NE = self._states(len(tree))
        logits_NV = torch.zeros(len(tree), VOCAB)
        self.drafter.observe(new_ids, Verified(tree, path, new_ids, logits_NV, states_NE))
        root = len(self.tokens) - 1
        self.plain.pairs += [
            Pair(root + i, token_id, states_NE[node])
            for i, (node, token_id) in enumerate(zip(path, new_ids, strict=True))
        ]
        self.tokens += new_ids

    def check(self) -> None:
        assert self.drafted() == self.plain.tree(self.tokens[-1])


# Rows before the window are not run, so that those of a further layer would see other rows below.
@pytest.mark.parametrize(
    ("name", "window"),
    [
        *((name, UNLIMITED) for name in HEADS),
        *((name, Window(2, 6)) for name in HEADS if name != DEEP),
    ],
)
def test_drafts_are_those_of_a_plain_recomputation(
    name: str, window: Window, tmp_path: Path
) -> None:
    """Whatever path was accepted before, and with what was drafted beside it forgotten."""
    config = config_of(name, tmp_path, sinks=window.sinks, window=window.length)
    dialogue = Dialogue(config.build_drafter(TARGET), Plain(HEADS[name], window))
    for _ in range(4):
        dialogue.check()
        dialogue.step()
    dialogue.check()


@pytest.mark.skipif(not has_fast_bf16(TARGET.device), reason="needs fast bf16")
@pytest.mark.parametrize("name", ["eagle2", "eagle3"])
def test_drafts_in_bf16_are_those_of_the_target_dtype_up_to_rounding(
    name: str, tmp_path: Path
) -> None:
    chances = []
    for bf16 in (False, True):
        drafter = config_of(name, tmp_path, bf16=bf16).build_drafter(TARGET)
        assert (drafter._cache.dtype == torch.bfloat16) == bf16
        dialogue = Dialogue(drafter, Plain(HEADS[name]))
        for _ in range(3):
            dialogue.undrafted_step()
        built = dialogue.drafted()
        chances.append({built.tokens[n]: built.claims[n].share for n in built.children(0)})
    exact, rounded = chances
    assert len(exact.keys() & rounded.keys()) > len(exact) // 2
    for token_id in exact.keys() & rounded.keys():
        assert rounded[token_id] == pytest.approx(exact[token_id], abs=0.06)


@pytest.mark.parametrize("prompt_len", [1, 2, 300])
def test_prompts_of_any_length_are_read(prompt_len: int, tmp_path: Path) -> None:
    """The longest in more than one pass."""
    window = Window(3, 280)
    config = config_of("eagle2", tmp_path, sinks=window.sinks, window=window.length)
    prompt = random_ids(prompt_len, seed=4)
    dialogue = Dialogue(config.build_drafter(TARGET), Plain(EAGLE2, window), prompt)
    dialogue.check()


def _with_slack(drafter: EagleDrafter, window: Window, slack: int) -> None:
    """A smaller cache, so that it is full soon."""
    rows = TOPK * (DEPTH - 1)
    drafter._cache = WindowedCache(
        drafter._head.shape,
        window,
        max_drafted=rows,
        device=TARGET.device,
        dtype=TARGET.dtype,
        slack=slack,
    )


def test_drafts_stay_those_when_the_cache_was_full(tmp_path: Path) -> None:
    window, drops = Window(2, 6), 0
    drafter = config_of("eagle3", tmp_path, sinks=2, window=6).build_drafter(TARGET)
    _with_slack(drafter, window, 9)
    dialogue = Dialogue(drafter, Plain(EAGLE3, window))
    for _ in range(14):
        before = len(drafter._cache.positions)
        dialogue.step()
        if len(drafter._cache.positions) < before:
            drops += 1
            dialogue.check()
    assert drops > 1


def test_states_that_pile_up_undrafted_are_read(tmp_path: Path) -> None:
    drafter = config_of("eagle2", tmp_path, window=20).build_drafter(TARGET)
    _with_slack(drafter, Window(4, 20), 5)
    dialogue = Dialogue(drafter, Plain(EAGLE2, Window(4, 20)))
    for _ in range(9):
        dialogue.undrafted_step()
        assert len(drafter._unread) <= 5
    dialogue.check()


def test_nothing_is_drafted_until_the_last_token_s_state_is_known(tmp_path: Path) -> None:
    drafter = config_of("eagle2", tmp_path).build_drafter(TARGET)
    dialogue = Dialogue(drafter, Plain(EAGLE2))
    assert len(dialogue.drafted()) > 1
    drafter.observe([7, 8], None)
    dialogue.tokens += [7, 8]
    assert len(dialogue.drafted()) == 1
    dialogue.step()
    dialogue.check()


def test_a_new_request_owes_nothing_to_the_last_one(tmp_path: Path) -> None:
    drafter = config_of("eagle2", tmp_path).build_drafter(TARGET)
    for prompt in (PROMPT, random_ids(9, seed=7)):
        dialogue = Dialogue(drafter, Plain(EAGLE2), prompt)
        dialogue.step()
        dialogue.check()


@over_heads
def test_a_larger_budget_only_adds_nodes(name: str, tmp_path: Path) -> None:
    """So that the controller may judge all sizes by one tree."""
    drafter = config_of(name, tmp_path, topk=5, depth=6).build_drafter(TARGET)
    dialogue = Dialogue(drafter, Plain(HEADS[name]))
    whole = dialogue.drafted(max_nodes=40)
    for max_nodes in range(1, 41, 3):
        tree = dialogue.drafted(max_nodes=max_nodes)
        assert tree.tokens == whole.tokens[:max_nodes]
        assert tree.parents == whole.parents[:max_nodes]


@pytest.mark.parametrize("min_chance", [0.6, 0.7])
def test_no_level_is_looked_at_behind_unlikely_nodes_alone(
    min_chance: float, tmp_path: Path
) -> None:
    config = config_of("eagle2", tmp_path, min_chance=min_chance)
    dialogue = Dialogue(config.build_drafter(TARGET), Plain(EAGLE2, min_chance=min_chance))
    depths = set[int]()
    for _ in range(6):
        dialogue.check()
        depths.add(max(dialogue.step().depths))
    assert len(depths) > 1


def test_what_others_drafted_is_kept_and_costs_no_room_twice(tmp_path: Path) -> None:
    drafter = config_of("eagle2", tmp_path).build_drafter(TARGET)
    dialogue = Dialogue(drafter, Plain(EAGLE2))
    whole = dialogue.drafted(max_nodes=9)
    first = whole.tokens[1]
    foreign = next(token_id for token_id in range(VOCAB) if token_id not in whole.tokens)
    builder = TreeBuilder(dialogue.tokens[-1], max_nodes=10)
    builder.add_path([first, foreign], source=1)
    drafter.extend_tree(builder, source=2)
    tree = builder.build()
    assert tree.tokens[1:3] == (first, foreign)
    assert tree.sources == (0, 1, 1, *(2,) * 7)
    assert sorted(tree.tokens) == sorted([*whole.tokens, foreign])


def _vocabulary(ids: Sequence[int], folder: Path) -> str:
    path = folder / "freq.pt"
    torch.save(list(ids), path)
    return str(path)


def _frspec(folder: Path, ids: Sequence[int], head: Head = EAGLE2, **settings: Any) -> FrSpecConfig:
    path = str(head.write(folder / "head"))
    settings = {"depth": DEPTH, "topk": TOPK, "min_chance": 0.0} | settings
    return FrSpecConfig(head=path, vocabulary=_vocabulary(ids, folder), **settings)


def test_frspec_with_all_tokens_is_eagle(tmp_path: Path) -> None:
    ids = random.Random(3).sample(range(VOCAB), VOCAB)
    dialogue = Dialogue(_frspec(tmp_path, ids).build_drafter(TARGET), Plain(EAGLE2))
    for _ in range(3):
        dialogue.step()
        dialogue.check()


@pytest.mark.parametrize("document_ids", [False, True])
@pytest.mark.parametrize("size", [None, 12])
def test_frspec_drafts_the_listed_tokens_and_those_of_the_prompt(
    size: int | None, document_ids: bool, tmp_path: Path
) -> None:
    listed = list(range(0, 60, 3))
    config = _frspec(tmp_path, listed, document_ids=document_ids, vocabulary_size=size)
    scored = {*TARGET.stop_ids, *listed[: None if size is None else size - len(TARGET.stop_ids)]}
    if document_ids:
        scored.update(PROMPT)
    plain = Plain(EAGLE2, scored=sorted(scored))
    dialogue = Dialogue(config.build_drafter(TARGET), plain)
    drafted = set[int]()
    for _ in range(4):
        drafted.update(dialogue.step().tokens[1:])
        dialogue.check()
    assert drafted <= scored
    assert not document_ids or drafted & set(PROMPT) - set(listed)


def test_frspec_scores_fewer_tokens_than_a_level_is_wide(tmp_path: Path) -> None:
    config = _frspec(tmp_path, [5], document_ids=False, topk=8)
    dialogue = Dialogue(config.build_drafter(TARGET), Plain(EAGLE2))
    assert set(dialogue.drafted().tokens[1:]) == {5, *TARGET.stop_ids}


def test_a_head_that_knows_the_target_is_accepted_whole(tmp_path: Path) -> None:
    """The target's next token depends on the last one alone, by its LM head, and the head is built
    to tell the state of each token from its embedding.
    """
    weight_M = 1e5 * (torch.rand(HIDDEN, generator=torch.Generator().manual_seed(1)) + 0.2)
    zeros = {
        name: torch.zeros_like(tensor)
        for name, tensor in EAGLE2.tensors.items()
        if name.endswith(("o_proj.weight", "down_proj.weight", "fc.bias"))
    }
    fc = torch.cat((weight_M.diag(), torch.zeros(HIDDEN, HIDDEN)), dim=1)
    path = EAGLE2.adding(**zeros, **{"fc.weight": fc}).write(tmp_path)
    next_ids = ((TARGET.embedding() * weight_M) @ TARGET.head().T).argmax(dim=-1).tolist()
    drafter = EagleConfig(head=str(path), depth=6).build_drafter(TARGET)
    for token_id in range(0, VOCAB, 20):
        drafter.begin(DraftRequest([1], SamplingParams()))
        drafter.read([0], torch.zeros(1, HIDDEN))
        drafter.observe([token_id], None)
        builder = TreeBuilder(token_id, max_nodes=12)
        drafter.extend_tree(builder, source=1)
        tree, node = builder.build(), 0
        for _ in range(6):
            expected = next_ids[tree.tokens[node]]
            node = next(c for c in tree.children(node) if tree.tokens[c] == expected)


SHAPE = HeadShape(
    hidden_size=8, intermediate_size=8, num_heads=4, num_kv_heads=2, head_dim=8, state_sizes=(8,)
)


@pytest.mark.parametrize("window", [Window(0, 5), Window(3, 7), Window(4, 64)])
def test_rows_see_sinks_window_and_their_branch_and_nothing_else_is_held(window: Window) -> None:
    """Over passes of many sizes, gaps between positions, and trees in between."""
    slack, rng = 9, random.Random(0)
    cache = WindowedCache(
        SHAPE, window, max_drafted=6, device=torch.device("cpu"), dtype=torch.float64, slack=slack
    )
    positions: list[int] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    drops = 0
    for _ in range(40):
        start = (positions[-1] if positions else -1) + rng.choice([1, 1, 1, 4])
        new = list(range(start, start + rng.randint(1, slack)))
        q_HTD, k_KTD, v_KTD = (torch.randn(n, len(new), 8).double() for n in (4, 2, 2))
        before = len(cache.positions)
        out_HTD = cache.extend(torch.tensor(new))(0, q_HTD, k_KTD, v_KTD)
        positions += new
        keys.append(k_KTD)
        values.append(v_KTD)
        visible = [[_sees(window, q, k) for k in positions] for q in new]
        expected = _attention(
            q_HTD, torch.cat(keys, 1), torch.cat(values, 1), torch.tensor(visible)
        )
        torch.testing.assert_close(out_HTD, expected)
        if len(cache.positions) < before + len(new):
            drops += 1
            assert cache.positions == [p for p in positions if p in new or _sees(window, new[0], p)]
        _check_draft(cache, positions, torch.cat(keys, 1), torch.cat(values, 1))
    assert drops > 2
    assert len(cache.positions) <= window.sinks + window.length + slack


def _sees(window: Window, q: int, k: int) -> bool:
    return k <= q and (k < window.sinks or q - k < window.length)


def _check_draft(cache: WindowedCache, positions: list[int], k_KTD: Tensor, v_KTD: Tensor) -> None:
    """Two levels of three rows; the second one's rows see one each of the first."""
    parents_WN = torch.tensor([[0, 1, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.bool)
    itself_WW = torch.eye(3, dtype=torch.bool)
    levels = (itself_WW, torch.cat((parents_WN, itself_WW), dim=1))
    for depth, visible_WN in enumerate(levels):
        q_HTD, new_k_KTD, new_v_KTD = (torch.randn(n, 3, 8).double() for n in (4, 2, 2))
        position = positions[-1] + 1 + depth
        out_HTD = cache.draft(position, visible_WN)(0, q_HTD, new_k_KTD, new_v_KTD)
        k_KTD, v_KTD = torch.cat((k_KTD, new_k_KTD), 1), torch.cat((v_KTD, new_v_KTD), 1)
        text = torch.tensor([_sees(cache.window, position, p) for p in positions]).expand(3, -1)
        expected = _attention(q_HTD, k_KTD, v_KTD, torch.cat((text, visible_WN), dim=1))
        torch.testing.assert_close(out_HTD, expected)


def _attention(q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, visible_TS: Tensor) -> Tensor:
    k_HSD, v_HSD = (part.repeat_interleave(2, dim=0) for part in (k_KSD, v_KSD))
    scores_HTS = q_HTD @ k_HSD.transpose(1, 2) / math.sqrt(8)
    return F.softmax(scores_HTS.masked_fill(~visible_TS, -math.inf), dim=-1) @ v_HSD


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"depth": 0}, "drafter.depth=0 must be at least 1"),
        ({"topk": 0}, "drafter.topk=0"),
        ({"min_chance": 1.0}, "drafter.min_chance=1.0"),
        ({"sinks": -1}, "drafter.sinks=-1"),
        ({"window": 5, "depth": 5}, "drafter.window=5 must be at least 6"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        EagleConfig(**settings)


def test_what_is_missing_or_makes_no_sense_is_named(tmp_path: Path) -> None:
    path = str(EAGLE3.write(tmp_path / "eagle3"))
    for config, words in (
        (EagleConfig(), "drafter.head is not set"),
        (
            FrSpecConfig(head=str(EAGLE2.write(tmp_path / "eagle2"))),
            "drafter.vocabulary is not set",
        ),
        (FrSpecConfig(head=path, entering=[0, 1, 2]), "60 tokens of its own.*drafter=eagle"),
        (EagleConfig(head=path), "set drafter.entering"),
    ):
        with pytest.raises(InputError, match=words):
            config.build_drafter(TARGET)
