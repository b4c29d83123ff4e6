"""Tokens after a prefill: read the query, choose token by token, or score given ones.

Rank 0, the owner, chooses and tells the others: with every token where all ranks decode together,
or once at the end where the cache was handed over and only the owner works.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from apb.comm import Kind, Tag
from apb.engine import Engine
from apb.errors import RequestError
from apb.methods.decode import OWNER
from apb.metrics import Timeline
from apb.sampling import Sampler, SamplingParams

_LOGIT_ROWS = 256
"""Rows whose logits are held at once when scoring: 256 rows of 128K logits are 128 MiB."""
_AT_THE_END = Tag(0, 0, Kind.CONTROL)


class Verdict(IntEnum):
    """What the owner tells the other ranks with each token."""

    CONTINUE = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    NOT_FINITE = 4


class Step(NamedTuple):
    """One generated token, and why it is the last one (None where it is not)."""

    token_id: int
    finish_reason: str | None


def generate(
    engine: Engine,
    query_ids: Sequence[int],
    params: SamplingParams,
    *,
    timeline: Timeline,
    is_last: Callable[[int], bool],
    is_cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Step]:
    """Read the query and decode; `Engine.prefill` has run with room for both.

    Args:
        engine: on every rank.
        query_ids: all query tokens, at least one.
        params: the sampler's settings; `max_tokens` at most.
        timeline: gets the phases `query` and `decode`.
        is_last: the owner's word on whether a token ends the answer (stop ids and strings).
        is_cancelled: asked on the owner before each token.

    Raises:
        RequestError: the logits are not finite, on every rank.
    """
    steps = partial(
        _steps,
        engine,
        query_ids,
        params,
        timeline=timeline,
        is_last=is_last,
        is_cancelled=is_cancelled,
    )
    if engine.decodes_together:
        yield from steps()
    elif engine.is_owner:
        yield from _telling_others(engine, steps())
    else:
        yield from _told_by_owner(engine)


def _telling_others(engine: Engine, steps: Iterator[Step]) -> Iterator[Step]:
    """The owner's steps; the others get them at the end, also of an answer given up."""
    done: list[Step] = []
    failure = None
    try:
        for step in steps:
            done.append(step)
            yield step
    except RequestError as error:
        failure = str(error)
        raise
    finally:
        state = [engine.step, engine.next_position]
        told = {"state": state, "steps": done, "failure": failure}
        engine.comm.all_gather_json(told, _AT_THE_END)


def _told_by_owner(engine: Engine) -> Iterator[Step]:
    told = engine.comm.all_gather_json(None, _AT_THE_END)[OWNER]
    engine.step, engine.next_position = told["state"]
    yield from (Step(*step) for step in told["steps"])
    if told["failure"] is not None:
        raise RequestError(told["failure"])


def _steps(
    engine: Engine,
    query_ids: Sequence[int],
    params: SamplingParams,
    *,
    timeline: Timeline,
    is_last: Callable[[int], bool],
    is_cancelled: Callable[[], bool],
) -> Iterator[Step]:
    sampler = Sampler(params)
    pending: Sequence[int] = query_ids
    for index in range(params.max_tokens):
        with timeline.phase("decode" if index else "query"):
            hidden_TM = engine.extend(pending)
            token_id, verdict = _choose(engine, hidden_TM[-1:], sampler)
            if verdict is Verdict.CONTINUE and engine.is_owner:
                if is_last(token_id):
                    verdict = Verdict.STOP
                elif index + 1 == params.max_tokens:
                    verdict = Verdict.LENGTH
                elif is_cancelled():
                    verdict = Verdict.CANCELLED
            tag = Tag(engine.step, 0, Kind.CONTROL)
            token_id, code = engine.decode_comm.broadcast_ints([token_id, verdict], tag, src=OWNER)
        if code == Verdict.NOT_FINITE:
            raise RequestError(_not_finite(engine.next_position - 1))
        if code != Verdict.CONTINUE:
            yield Step(token_id, Verdict(code).name.lower())
            return
        yield Step(token_id, None)
        pending = [token_id]


def _choose(engine: Engine, hidden_1M: Tensor, sampler: Sampler) -> tuple[int, Verdict]:
    if not engine.is_owner:
        return 0, Verdict.CONTINUE
    logits_V = engine.model.logits(hidden_1M)[0]
    if not bool(logits_V.isfinite().all()):
        return 0, Verdict.NOT_FINITE
    return sampler(logits_V), Verdict.CONTINUE


def logprobs(engine: Engine, token_ids: Sequence[int], targets: Sequence[int]) -> list[float]:
    """Log-probability of ``targets[i]`` after ``token_ids[i]``; `prefill` has run with room.

    Raises:
        RequestError: the logits are not finite, on every rank.
    """
    hidden_TM = engine.extend(token_ids)
    values: list[float] = []
    finite = True
    if engine.is_owner:
        targets_T = torch.tensor(targets, dtype=torch.int64, device=hidden_TM.device)
        for rows_TM, wanted_T in zip(
            hidden_TM.split(_LOGIT_ROWS), targets_T.split(_LOGIT_ROWS), strict=True
        ):
            logits_TV = engine.model.logits(rows_TM)
            finite = finite and bool(logits_TV.isfinite().all())
            chosen_T = logits_TV.log_softmax(dim=-1).gather(1, wanted_T[:, None])[:, 0]
            values += chosen_T.tolist()
    tag = Tag(engine.step, 0, Kind.CONTROL)
    found = engine.comm.all_gather_json(values if finite else None, tag)[OWNER]
    if found is None:
        raise RequestError(_not_finite(engine.next_position - 1))
    result: list[float] = found
    return result


def _not_finite(position: int) -> str:
    return (
        f"the logits at position {position} are not finite: the model overflowed, so try "
        "dtype=float32 or check its weights"
    )
