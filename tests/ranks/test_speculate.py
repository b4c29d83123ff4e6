"""Guarantees of speculative decoding: the answer of plain decoding, whatever is drafted (E7)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import pytest
import torch

from apb.comm import Communicator
from apb.compress.knorm import KnormConfig
from apb.compress.window import WindowConfig
from apb.generation import generate
from apb.hf.tokenizer import load_tokenizer
from apb.methods.apb import ApbConfig
from apb.methods.placement import Placement
from apb.metrics import Timeline
from apb.paths import model_home
from apb.plugins import PLUGINS
from apb.prompts.needle import make_needle
from apb.prompts.template import build_prompt
from apb.sampling import SamplingParams
from apb.speculate.base import (
    MAX_NODES,
    Drafter,
    DrafterConfig,
    DraftRequest,
    DraftTarget,
    Needs,
    Verified,
)
from apb.speculate.control import ControllerKind
from apb.speculate.speculator import SpeculationStats, Speculator
from apb.speculate.tree import TreeBuilder
from apb.speculate.verify import VerifierKind
from eagle_checkpoints import eagle2_head, eagle3_head
from models import VOCAB, draft_target, hf_model, model_config, random_ids
from rank_pool import RankPool, same_on_all_ranks
from ranks.cases import make_prompt
from ranks.programs import Case, make_engine

PoolOf = Callable[[int], RankPool]
Answer = list[tuple[int, str | None]]

MAX_TOKENS = 36
GREEDY = SamplingParams(max_tokens=MAX_TOKENS)
SAMPLED = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.9, top_p=0.9, top_k=50, seed=3)
CASE = Case(
    model="llama",
    method=ApbConfig(compressor=KnormConfig(), min_block_len=1),
    prompt=make_prompt(61, prefix_len=2, query_len=5),
    new_ids=random_ids(5, seed=9),
)
SMOLLM2 = "smollm2-135m"
NAMES = [*sorted(set(PLUGINS["drafter"]) - {"none"}), "eagle3"]

over_ranks = pytest.mark.parametrize("world_size", [1, 2, 3])
over_placements = pytest.mark.parametrize(
    "placement", [Placement.sharded, Placement.rank0], ids=lambda p: p.name
)
over_sampling = pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


class Prophet(Drafter):
    """Knows the answer and hides it among other branches, up to a point that differs each time."""

    def __init__(self, answer: Sequence[int]) -> None:
        self._answer, self._emitted, self._rng = answer, 0, random.Random(0)

    def begin(self, request: DraftRequest) -> None: ...

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        assert list(self._answer[self._emitted : self._emitted + len(new_ids)]) == list(new_ids)
        self._emitted += len(new_ids)

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        node: int | None = 0
        for token_id in self._answer[self._emitted : self._emitted + self._rng.randint(0, 5)]:
            assert node is not None
            for _ in range(self._rng.randint(0, 2)):
                other = tree.add(node, self._rng.randint(0, 255), source=source)
                if other is not None:
                    tree.add(other, token_id, source=source)
            node = tree.add(node, token_id, source=source)
            if node is None:
                return
            if self._rng.random() < 0.5:
                tree.add(node, self._rng.randint(0, 255), source=source)


@dataclass(kw_only=True, slots=True)
class ProphetConfig(DrafterConfig):
    answer: tuple[int, ...] = ()
    controller: ControllerKind = ControllerKind.fixed

    def build_drafter(self, target: DraftTarget) -> Prophet:
        return Prophet(self.answer)


class Listener(Drafter):
    """Drafts nothing and keeps what it is told of the prompt."""

    needs = Needs(final=True, first=3, last=MAX_NODES)

    def __init__(self, heard: dict[int, torch.Tensor]) -> None:
        self._heard = heard

    def begin(self, request: DraftRequest) -> None: ...

    def read(self, positions: Sequence[int], states_TE: torch.Tensor) -> None:
        self._heard.update(zip(positions, states_TE, strict=True))

    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None: ...

    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None: ...


@dataclass(kw_only=True, slots=True)
class ListenerConfig(DrafterConfig):
    heard: dict[int, torch.Tensor]

    def build_drafter(self, target: DraftTarget) -> Listener:
        return Listener(self.heard)


class Stop(NamedTuple):
    """When an answer ends early, on the owner's word."""

    last: int | None = None
    """With this token."""
    cancelled_after: int | None = None
    """So many tokens."""


NEVER = Stop()


def decode(
    comm: Communicator, case: Case, params: SamplingParams, config: DrafterConfig, stop: Stop
) -> tuple[Answer, SpeculationStats]:
    """The answer, and rank 0's figures. The cache has just the room that a request reserves."""
    room = (0,) * params.max_tokens
    engine = make_engine(comm, replace(case, new_ids=case.new_ids + room))
    speculator = None
    if comm.rank == 0:
        speculator = Speculator(config, draft_target(case.model))
        speculator.begin([*case.prompt.context_ids, *case.new_ids], params)
        speculator.wait()
    asked = count(1)
    steps = generate(
        engine,
        case.new_ids,
        params,
        timeline=Timeline(torch.device("cpu")),
        is_last=lambda token_id: token_id == stop.last,
        is_cancelled=lambda: next(asked) == stop.cancelled_after,
        speculator=speculator,
        max_nodes=config.max_nodes,
    )
    answer = [(step.token_id, step.finish_reason) for step in steps]
    return answer, speculator.stats if speculator else SpeculationStats()


def run(
    pool: RankPool,
    case: Case,
    params: SamplingParams,
    config: DrafterConfig,
    stop: Stop = NEVER,
) -> tuple[Answer, SpeculationStats]:
    results = pool.run(decode, case, params, config, stop)
    return same_on_all_ranks([answer for answer, _ in results]), results[0][1]


Plain = Callable[[RankPool, Case, SamplingParams], Answer]


@pytest.fixture(scope="module")
def plain() -> Plain:
    """Plain decoding, once for each case."""
    known: dict[str, Answer] = {}

    def plain(pool: RankPool, case: Case, params: SamplingParams) -> Answer:
        key = f"{pool.world_size} {case} {params}"
        if key not in known:
            known[key] = run(pool, case, params, PLUGINS["drafter"]["none"]())[0]
        return known[key]

    return plain


@over_ranks
@over_placements
@over_sampling
@pytest.mark.parametrize("model", ["llama", "qwen2"])
def test_trees_that_hold_the_answer_yield_it_in_fewer_steps(
    pool_of: PoolOf,
    plain: Plain,
    model: str,
    params: SamplingParams,
    placement: Placement,
    world_size: int,
) -> None:
    """Paths of all shapes are kept, so that a wrongly moved key would show in what follows."""
    case, pool = replace(CASE, model=model, placement=placement), pool_of(world_size)
    expected = plain(pool, case, params)
    config = ProphetConfig(answer=tuple(token_id for token_id, _ in expected))
    answer, stats = run(pool, case, params, config)
    assert answer == expected
    assert stats.steps < MAX_TOKENS / 2
    assert stats.emitted == MAX_TOKENS - 1


@over_ranks
@over_placements
def test_answers_end_within_a_step_where_plain_ones_end(
    pool_of: PoolOf, plain: Plain, placement: Placement, world_size: int
) -> None:
    case, pool = replace(CASE, placement=placement), pool_of(world_size)
    whole = plain(pool, case, GREEDY)
    config = ProphetConfig(answer=tuple(token_id for token_id, _ in whole))
    for index in (0, 7, 8, 30):
        last = whole[index][0]
        first = [token_id for token_id, _ in whole].index(last)
        stop = Stop(last=last)
        assert run(pool, case, GREEDY, config, stop)[0] == [*whole[:first], (last, "stop")]
        stop = Stop(cancelled_after=index + 1)
        expected = [*whole[:index], (last, "cancelled")]
        assert run(pool, case, GREEDY, config, stop)[0] == expected


ConfigOf = Callable[[str], DrafterConfig]


@pytest.fixture(scope="module")
def config_of(tmp_path_factory: pytest.TempPathFactory) -> ConfigOf:
    """Drafters with all that they need to draft for the tiny model, random EAGLE heads among it."""
    folder = tmp_path_factory.mktemp("drafters")
    head = str(eagle2_head(vocab_size=VOCAB).write(folder / "eagle2"))
    head3 = str(eagle3_head(vocab_size=VOCAB, num_scored=60).write(folder / "eagle3"))
    frequent = str(folder / "freq_40.pt")
    torch.save(list(range(40)), frequent)
    settings: dict[str, dict[str, Any]] = {
        "suffix": {"min_match": 1},  # in random text longer matches are rare
        "eagle": {"head": head, "window": 16},
        "eagle3": {"head": head3, "entering": [0, 1, 2]},
        "frspec": {"head": head, "vocabulary": frequent},
        "hybrid": {"head": head, "vocabulary": frequent, "min_match": 1, "enough": 100.0},
        "model": {"model": "tiny"},
    }

    def config_of(name: str) -> DrafterConfig:
        config: DrafterConfig = PLUGINS["drafter"][name.rstrip("3")](
            max_nodes=9, controller=ControllerKind.fixed, **settings.get(name, {})
        )
        return config

    return config_of


@pytest.fixture(scope="module")
def real_case() -> Case:
    """SmolLM2 is to summarise a document."""
    tokenizer = load_tokenizer(model_config(SMOLLM2))
    needle = make_needle(lambda text: len(tokenizer(text)["input_ids"]), context_len=600, seed=4)
    prompt = build_prompt(tokenizer, needle.document, "Summarize the text above.")
    return Case(
        model=SMOLLM2,
        method=ApbConfig(compressor=WindowConfig(), min_block_len=1),
        prompt=prompt,
        new_ids=prompt.query_ids,
    )


@pytest.mark.long
@pytest.mark.timeout(600)
@over_ranks
@over_placements
@pytest.mark.parametrize("name", NAMES)
def test_every_drafter_leaves_a_long_answer_as_it_is(
    pool_of: PoolOf,
    plain: Plain,
    config_of: ConfigOf,
    name: str,
    placement: Placement,
    world_size: int,
) -> None:
    case, pool = replace(CASE, placement=placement), pool_of(world_size)
    params = replace(GREEDY, max_tokens=200)
    answer, stats = run(pool, case, params, config_of(name))
    assert answer == plain(pool, case, params)
    assert stats.nodes > stats.steps, "nothing was drafted"


@pytest.mark.long
@pytest.mark.model
@pytest.mark.skipif(not (model_home() / SMOLLM2).is_dir(), reason="needs `make model`")
@pytest.mark.timeout(600)
@over_ranks
@over_placements
@pytest.mark.parametrize("name", sorted(set(PLUGINS["drafter"]) - {"none"}))
def test_every_drafter_leaves_a_real_models_answer_as_it_is(
    pool_of: PoolOf, plain: Plain, real_case: Case, name: str, placement: Placement, world_size: int
) -> None:
    """With what apb ships for the model, and the model itself as its draft model."""
    case, pool = replace(real_case, placement=placement), pool_of(world_size)
    params = replace(GREEDY, max_tokens=200)
    config = PLUGINS["drafter"][name](**({"model": SMOLLM2} if name == "model" else {}))
    answer, stats = run(pool, case, params, config)
    assert answer == plain(pool, case, params)
    assert stats.nodes > stats.steps, "nothing was drafted"


def follows_plain(config: DrafterConfig) -> bool:
    return Speculator(config, draft_target(CASE.model)).verifier.follows_plain


@over_ranks
@over_placements
@over_sampling
@pytest.mark.parametrize("name", NAMES)
def test_every_drafter_leaves_the_answer_as_it_is(
    pool_of: PoolOf,
    plain: Plain,
    config_of: ConfigOf,
    name: str,
    params: SamplingParams,
    placement: Placement,
    world_size: int,
) -> None:
    """Where the verifier weighs what sampled drafts were drawn from, answers have the distribution
    of plain ones (E8 in test_verifiers.py), and here only have to repeat.
    """
    case, pool = replace(CASE, placement=placement), pool_of(world_size)
    config = config_of(name)
    answer, stats = run(pool, case, params, config)
    if params is GREEDY or follows_plain(config):
        assert answer == plain(pool, case, params)
    else:
        assert answer == run(pool, case, params, config)[0]
        assert answer != plain(pool, case, params), "the verifier never saw what was drawn from"
        one_hot = replace(config, verifier=VerifierKind.onehot)
        assert run(pool, case, params, one_hot)[0] == plain(pool, case, params)
    assert stats.nodes > stats.steps, "nothing was drafted"


@pytest.mark.parametrize("prefix_len", [0, 2])
def test_drafters_read_the_beginning_of_the_document_and_not_of_the_anchor(prefix_len: int) -> None:
    prompt = make_prompt(300, prefix_len=prefix_len, query_len=5)
    case = replace(CASE, prompt=prompt, num_blocks=2)
    engine = make_engine(Communicator(0, 1, torch.device("cpu")), case)
    heard: dict[int, torch.Tensor] = {}
    speculator = Speculator(ListenerConfig(heard=heard), draft_target(case.model))
    speculator.begin([*prompt.context_ids, *prompt.query_ids], GREEDY)
    speculator.wait()
    rows = engine.prefill(prompt, case.plan(1), room=0)
    assert rows.local.start > 0, "no copy of the anchor"
    speculator.read(rows.positions, rows.local)
    assert sorted(heard) == [0, 1, 2, *range(300 - MAX_NODES, 300)]
    exact = hf_model(case.model).base_model(torch.tensor([prompt.context_ids[:3]]))
    first_TM = torch.stack([heard[position] for position in range(3)])
    torch.testing.assert_close(first_TM, exact.last_hidden_state[0], atol=1e-4, rtol=1e-4)


def test_plain_decoding_takes_a_step_for_each_token_but_the_first(pool_of: PoolOf) -> None:
    _, stats = run(pool_of(1), CASE, GREEDY, PLUGINS["drafter"]["none"]())
    assert (stats.steps, stats.nodes) == (MAX_TOKENS - 1, MAX_TOKENS - 1)
