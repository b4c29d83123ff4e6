"""Guarantees of decoding: Hugging Face's greedy tokens, the same tokens on every rank, seeds, and
requests that fail without taking the engine along.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from itertools import islice
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from apb.comm import Communicator
from apb.compress.query import QueryConfig
from apb.engine import Engine
from apb.errors import RequestError
from apb.generation import generate as generate_steps
from apb.hf.model import CausalLM
from apb.methods.apb import ApbConfig
from apb.methods.full import FullConfig
from apb.methods.placement import Placement
from apb.methods.ring import RingConfig
from apb.metrics import Timeline
from apb.sampling import SamplingParams
from apb.scoring import logprobs
from models import NAMES, apb_model, hf_model, random_ids
from rank_pool import RankPool, same_on_all_ranks
from ranks.cases import make_prompt
from ranks.programs import Case, make_engine, prefill

WORLD_SIZES = (1, 2, 3)
MAX_TOKENS = 20
GREEDY = SamplingParams(max_tokens=MAX_TOKENS)
SAMPLED = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.9, top_p=0.9, top_k=50, seed=3)

PoolOf = Callable[[int], RankPool]
Tokens = list[tuple[int, str | None]]

PLACEMENTS = (Placement.sharded, Placement.rank0)
RING = RingConfig()
APB = ApbConfig(compressor=QueryConfig(), min_block_len=1)
CASE = Case(
    model="llama",
    method=FullConfig(),
    prompt=make_prompt(61, prefix_len=2, query_len=5),
    new_ids=random_ids(5, seed=9),
)


def decode(engine: Engine, case: Case, params: SamplingParams, last: int | None) -> Tokens:
    timeline = Timeline(torch.device("cpu"))
    steps = generate_steps(
        engine, case.new_ids, params, timeline=timeline, is_last=lambda token_id: token_id == last
    )
    return [(step.token_id, step.finish_reason) for step in steps]


def generate(
    comm: Communicator, case: Case, params: SamplingParams, last: int | None = None
) -> Tokens:
    roomy = replace(case, new_ids=case.new_ids + (0,) * params.max_tokens)
    return decode(make_engine(comm, roomy), case, params, last)


def cancel_after(comm: Communicator, case: Case, num_tokens: int) -> Tokens:
    """The answer when rank 0 is asked to stop after `num_tokens`; the others' wish is void."""
    engine = make_engine(comm, replace(case, new_ids=case.new_ids + (0,) * MAX_TOKENS))
    asked: list[None] = []

    def is_cancelled() -> bool:
        asked.append(None)
        return comm.rank > 0 or len(asked) == num_tokens

    steps = generate_steps(
        engine,
        case.new_ids,
        GREEDY,
        timeline=Timeline(torch.device("cpu")),
        is_last=lambda _: False,
        is_cancelled=is_cancelled,
    )
    return [(step.token_id, step.finish_reason) for step in steps]


def give_up_after(comm: Communicator, case: Case, num_tokens: int) -> tuple[Tokens, Tokens]:
    """What was taken of an answer before nobody wanted more, and the whole answer afterwards."""
    engine = make_engine(comm, replace(case, new_ids=case.new_ids + (0,) * MAX_TOKENS))
    steps = generate_steps(
        engine,
        case.new_ids,
        GREEDY,
        timeline=Timeline(torch.device("cpu")),
        is_last=lambda _: False,
    )
    taken = [(step.token_id, step.finish_reason) for step in islice(steps, num_tokens)]
    assert isinstance(steps, Generator)
    steps.close()
    prefill(engine, case, room=len(case.new_ids) + MAX_TOKENS)
    return taken, decode(engine, case, GREEDY, None)


def count_forward_passes(comm: Communicator, case: Case) -> tuple[int, int, Tokens]:
    """How often the model runs during prefill and during decoding, and the answer."""
    roomy = replace(case, new_ids=case.new_ids + (0,) * MAX_TOKENS)
    with patch.object(CausalLM, "forward", autospec=True, side_effect=CausalLM.forward) as run:
        engine = make_engine(comm, roomy)
        in_prefill = run.call_count
        tokens = decode(engine, case, GREEDY, None)
        return in_prefill, run.call_count - in_prefill, tokens


def generate_with_broken_head(comm: Communicator, case: Case) -> tuple[list[str], Tokens]:
    """Errors of decoding and scoring while rank 0's LM head has a NaN; the answer once repaired."""
    engine = make_engine(comm, replace(case, new_ids=case.new_ids + (0,) * MAX_TOKENS))
    model = apb_model(case.model)
    head = model._model.get_output_embeddings().weight
    assert isinstance(head, Tensor)
    model._is_lean = False  # packed copies would not notice
    whole = head.detach().clone()
    errors = []
    if comm.rank == 0:
        head[7, 3] = float("nan")
    try:
        for run in (
            lambda: decode(engine, case, GREEDY, None),
            lambda: logprobs(engine, case.new_ids, case.new_ids),
        ):
            try:
                run()
            except RequestError as error:
                errors.append(str(error))
    finally:
        head.copy_(whole)
        model._is_lean = True
    prefill(engine, case, room=len(case.new_ids) + MAX_TOKENS)
    return errors, decode(engine, case, GREEDY, None)


def hf_greedy(model: str, token_ids: tuple[int, ...]) -> list[int]:
    oracle: Any = hf_model(model)
    output = oracle.generate(
        input_ids=torch.tensor([token_ids]),
        generation_config=GenerationConfig(
            max_new_tokens=MAX_TOKENS, do_sample=False, pad_token_id=0
        ),
    )
    tokens: list[int] = output[0, len(token_ids) :].tolist()
    return tokens


over_ranks = pytest.mark.parametrize("world_size", WORLD_SIZES)
over_placements = pytest.mark.parametrize("placement", PLACEMENTS, ids=lambda p: p.name)


@over_ranks
@over_placements
@pytest.mark.parametrize("model", NAMES)
def test_greedy_equals_the_hugging_face_model(
    pool_of: PoolOf, model: str, placement: Placement, world_size: int
) -> None:
    case = replace(CASE, model=model, method=RING, placement=placement)
    steps = same_on_all_ranks(pool_of(world_size).run(generate, case, GREEDY))
    assert [token_id for token_id, _ in steps] == hf_greedy(
        model, case.prompt.context_ids + case.new_ids
    )
    assert [reason for _, reason in steps] == [None] * (MAX_TOKENS - 1) + ["length"]


@over_ranks
@over_placements
@pytest.mark.parametrize("stop_at", [0, 4])
def test_answer_ends_with_the_first_stop_token(
    pool_of: PoolOf, stop_at: int, placement: Placement, world_size: int
) -> None:
    case = replace(CASE, method=RING, placement=placement)
    whole = same_on_all_ranks(pool_of(1).run(generate, CASE, GREEDY))
    last = whole[stop_at][0]
    first = [token_id for token_id, _ in whole].index(last)
    steps = same_on_all_ranks(pool_of(world_size).run(generate, case, GREEDY, last))
    assert steps == [*whole[:first], (last, "stop")]


@over_ranks
@over_placements
def test_cancelled_answer_ends_on_every_rank_where_the_owner_says(
    pool_of: PoolOf, placement: Placement, world_size: int
) -> None:
    case = replace(CASE, method=RING, placement=placement)
    whole = same_on_all_ranks(pool_of(1).run(generate, CASE, GREEDY))
    steps = same_on_all_ranks(pool_of(world_size).run(cancel_after, case, 3))
    assert steps == [*whole[:2], (whole[2][0], "cancelled")]


@over_ranks
@over_placements
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_answer_that_is_given_up_leaves_all_ranks_ready_for_the_next(
    pool_of: PoolOf, num_tokens: int, placement: Placement, world_size: int
) -> None:
    case = replace(CASE, method=RING, placement=placement)
    whole = same_on_all_ranks(pool_of(1).run(generate, CASE, GREEDY))
    taken, again = same_on_all_ranks(pool_of(world_size).run(give_up_after, case, num_tokens))
    assert taken == whole[:num_tokens]
    assert again == whole


@over_ranks
@over_placements
def test_only_the_owner_runs_the_model_where_it_holds_everything(
    pool_of: PoolOf, placement: Placement, world_size: int
) -> None:
    case = replace(CASE, method=RING, placement=placement)
    counts = pool_of(world_size).run(count_forward_passes, case)
    assert same_on_all_ranks([answer for _, _, answer in counts])
    together = placement is Placement.sharded
    for rank, (in_prefill, in_decode, _) in enumerate(counts):
        assert in_prefill == 1
        assert in_decode == (MAX_TOKENS if together or rank == 0 else 0)


def test_sampling_with_a_seed_is_the_same_on_any_ranks_and_another_seed_differs(
    pool_of: PoolOf,
) -> None:
    cases = [replace(CASE, method=RING, placement=placement) for placement in PLACEMENTS]
    answers = [
        same_on_all_ranks(pool_of(world_size).run(generate, case, SAMPLED))
        for world_size in (1, *WORLD_SIZES)
        for case in (CASE, *cases)
    ]
    assert all(answer == answers[0] for answer in answers)
    (other,) = pool_of(1).run(generate, CASE, replace(SAMPLED, seed=4))
    assert other != answers[0]


@pytest.mark.parametrize("world_size", [2, 3])
@over_placements
def test_sampling_without_a_seed_yields_one_answer_on_all_ranks(
    pool_of: PoolOf, placement: Placement, world_size: int
) -> None:
    case = replace(CASE, method=APB, placement=placement)
    params = replace(SAMPLED, seed=None)
    first = same_on_all_ranks(pool_of(world_size).run(generate, case, params))
    second = same_on_all_ranks(pool_of(world_size).run(generate, case, params))
    assert first != second


@over_ranks
@over_placements
@pytest.mark.parametrize("method", [FullConfig(), APB], ids=["full", "apb"])
def test_not_finite_logits_fail_the_request_on_every_rank_and_no_other(
    pool_of: PoolOf, method: FullConfig | ApbConfig, placement: Placement, world_size: int
) -> None:
    case = replace(CASE, method=method, placement=placement)
    pool = pool_of(world_size)
    errors, answer = same_on_all_ranks(pool.run(generate_with_broken_head, case))
    assert len(errors) == 2
    assert all("not finite" in error for error in errors)
    assert answer == same_on_all_ranks(pool.run(generate, case, GREEDY))
