"""Requests that end early: on all ranks after the same layer, and the next request is answered."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from apb.comm import Communicator
from apb.config import compose_config
from apb.errors import RequestError
from apb.interrupt import Interrupt
from apb.runner import RequestRunner
from rank_pool import RankPool, same_on_all_ranks

PoolOf = Callable[[int], RankPool]
PARAMS = {"max_tokens": 6, "ignore_eos": True}
DOCUMENT = "The miller kept bees. " * 30
LONG = "Who kept them? " * 9
"""More than a few rows."""
CANCELLED = "the request was cancelled while its prompt was read"
SETTINGS = [
    ("apb", "sharded"),
    ("apb", "rank0"),
    ("ring", "rank0"),
    ("full", "sharded"),
]


def cancels(at: int | None) -> Callable[[], bool]:
    """True when it is asked for that time."""
    asked = count()
    return lambda: next(asked) == at


def ask(
    runner: RequestRunner,
    *,
    cancel_at: int | None = None,
    timeout_s: float | None = None,
    question: str = "Who?",
) -> tuple[str, list[int]]:
    """How a request ended, with its tokens. The owner cancels when it is asked for that time."""
    is_cancelled = cancels(cancel_at)
    arguments: dict[str, Any] = {"document": DOCUMENT, "question": question, "params": PARAMS}
    if timeout_s is not None:
        arguments["timeout_s"] = timeout_s
    try:
        *_, last = runner.handle("ask", arguments, is_cancelled)
    except RequestError as error:
        return str(error), []
    return last["result"]["finish_reason"], last["result"]["token_ids"]


def score(runner: RequestRunner, *, cancel_at: int | None = None) -> str:
    """How a likelihood ended."""
    arguments = {"document": "Bees.", "continuation": DOCUMENT, "query": None}
    try:
        list(runner.handle("likelihood", arguments, cancels(cancel_at)))
    except RequestError as error:
        return str(error)
    return "whole"


def end_early(comm: Communicator, method: str, placement: str) -> dict[str, Any]:
    overrides = ["model=tiny", "device=cpu", "drafter=none", f"method={method}"]
    config = compose_config([*overrides, f"decode.placement={placement}"])
    runner = RequestRunner(config, comm)
    layers = config.model.architecture["num_hidden_layers"]  # type: ignore[index]
    return {
        "whole": ask(runner),
        "in_prefill": [ask(runner, cancel_at=at) for at in range(layers)],
        "in_decode": ask(runner, cancel_at=layers + 1),
        "in_question": [ask(runner, cancel_at=layers + at, question=LONG) for at in range(layers)],
        "in_scores": [score(runner, cancel_at=at) for at in (None, *range(2 * layers))],
        "late": ask(runner, timeout_s=1e-9),
        "again": ask(runner, timeout_s=1e9),
    }


@pytest.mark.parametrize(("method", "placement"), SETTINGS)
def test_all_ranks_give_up_together_and_answer_the_next_request(
    pool_of: PoolOf, method: str, placement: str
) -> None:
    outcome = same_on_all_ranks(pool_of(3).run(end_early, method, placement))
    assert outcome["whole"][0] == "length"
    assert len(outcome["whole"][1]) == 6
    for ended in outcome["in_prefill"]:
        assert ended == (CANCELLED, [])
    for reason, tokens in outcome["in_question"]:
        if placement == "sharded":
            assert (reason, tokens) == (CANCELLED, [])
        else:  # the owner reads it alone
            assert reason == "cancelled"
            assert tokens
    scored = outcome["in_scores"]
    layers = len(outcome["in_prefill"])
    together, alone = (2 * layers, 0) if placement == "sharded" else (layers, layers)
    assert scored == ["whole", *[CANCELLED] * together, *["whole"] * alone]
    reason, tokens = outcome["in_decode"]
    assert reason == "cancelled"
    assert tokens == outcome["whole"][1][: len(tokens)]
    assert 1 <= len(tokens) <= 2
    assert outcome["late"][0].startswith("the request took longer than timeout_s=1e-09")
    assert outcome["again"] == outcome["whole"]


def count_layers(comm: Communicator, due_at: int) -> int:
    """The layer after which a rank gives up if the owner's time passes with the one before."""
    done = 0
    interrupt = Interrupt(comm, timeout_s=due_at + 0.5, clock=lambda: float(done))
    try:
        while done < 12:
            interrupt.after_layer(is_last=False)
            done += 1
    except RequestError:
        return done
    return -1


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_request_ends_one_layer_after_its_time(pool_of: PoolOf, world_size: int) -> None:
    for due_at in (0, 4, 9):
        # The word of the first layer that is too late is read one layer further on.
        assert pool_of(world_size).run(count_layers, due_at) == [due_at + 2] * world_size


def time_out_while_decoding(comm: Communicator) -> list[str]:
    """The time passes with the first token."""
    now = 0.0
    interrupt = Interrupt(comm, timeout_s=1.0, clock=lambda: now)
    interrupt.after_layer(is_last=True)
    now = 2.0
    outcomes = [str(interrupt.is_due())]
    try:
        interrupt.check_deadline()
    except RequestError as error:
        outcomes.append(str(error))
    return outcomes


def test_a_deadline_that_passes_while_decoding_is_told_to_all(pool_of: PoolOf) -> None:
    outcomes = pool_of(3).run(time_out_while_decoding)
    sentence = (
        "the request took longer than timeout_s=1: raise it, shorten the document or ask for "
        "fewer tokens"
    )
    assert outcomes == [["True", sentence], ["False", sentence], ["False", sentence]]
