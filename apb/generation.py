"""Tokens after a prefill: read the query, then step by step a tree of drafts.

Rank 0, the owner, drafts, chooses and tells the others: with every step where all ranks decode
together, or every few seconds where the cache was handed over and only the owner works.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from apb.comm import Kind, Tag
from apb.engine import Engine
from apb.errors import NotFiniteError
from apb.methods.decode import OWNER
from apb.metrics import Timeline
from apb.sampling import Sampler, SamplingParams
from apb.speculate.base import Verified
from apb.speculate.speculator import Speculator
from apb.speculate.tree import DraftTree
from apb.speculate.verify import Walk, accept
from apb.trace.recorder import Trace
from apb.trace.records import Phase

_FROM_OWNER = Tag(0, 0, Kind.CONTROL)
_INSTALMENT_S = 5.0
"""How long the others wait at most for the next tokens of an owner that works alone."""


class Verdict(IntEnum):
    """How the owner wants to go on after a step."""

    CONTINUE = 0
    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    NOT_FINITE = 4


class Step(NamedTuple):
    """One generated token, and why it is the last one (None where it is not)."""

    token_id: int
    finish_reason: str | None


class Outcome(NamedTuple):
    """What the owner tells the other ranks after each forward pass."""

    verdict: Verdict
    token_ids: tuple[int, ...]
    """What was emitted."""
    path: tuple[int, ...]
    """Which nodes of the tree that was read are kept, the root first; none after the question."""
    tree: DraftTree
    """What is read next."""

    def packed(self, max_nodes: int) -> list[int]:
        """As many integers whatever happened: a tree's size bounds all that follows from it."""
        sizes = [len(self.token_ids), len(self.path), len(self.tree)]
        nodes = [*self.tree.tokens, *self.tree.parents]
        packed = [self.verdict, *sizes, *self.token_ids, *self.path, *nodes]
        assert len(packed) <= _packed_size(max_nodes), "a tree larger than was agreed"
        return [*packed, *[0] * (_packed_size(max_nodes) - len(packed))]

    @classmethod
    def unpacked(cls, packed: Sequence[int]) -> Outcome:
        verdict, num_tokens, path_len, num_nodes, *rest = packed
        values = iter(rest)
        token_ids, path, tokens, parents = (
            tuple(islice(values, size)) for size in (num_tokens, path_len, num_nodes, num_nodes)
        )
        tree = DraftTree(tokens, parents, (0,) * num_nodes)
        return cls(Verdict(verdict), token_ids, path, tree)


def _packed_size(max_nodes: int) -> int:
    return 4 + 4 * max_nodes


def generate(
    engine: Engine,
    query_ids: Sequence[int],
    params: SamplingParams,
    *,
    timeline: Timeline,
    is_last: Callable[[int], bool],
    is_cancelled: Callable[[], bool] = lambda: False,
    speculator: Speculator | None = None,
    max_nodes: int = 1,
) -> Iterator[Step]:
    """Read the query and decode; `Engine.prefill` has run with room for both.

    The tokens are those of plain decoding, whatever is drafted: each is chosen from the target's
    own logits at its place, with the same draws where they are sampled. Where drafts are drawn and
    the verifier weighs what they were drawn from, sampled tokens are other ones of the same
    distribution. In 16-bit dtypes rounding depends on the number of rows in a pass, so that near
    ties may fall the other way.

    Args:
        engine: on every rank.
        query_ids: all query tokens, at least one.
        params: the sampler's settings; `max_tokens` at most.
        timeline: gets the phases `query` and `decode`.
        is_last: the owner's word on whether a token ends the answer (stop ids and strings).
        is_cancelled: asked on the owner after each token.
        speculator: the owner's, begun with the prompt; None for plain decoding.
        max_nodes: of a tree, the same on every rank.

    Raises:
        NotFiniteError: the logits are not finite, on every rank.
    """
    writer = None
    if engine.is_owner:
        writer = _Writer(
            params, speculator, timeline.trace, is_last=is_last, is_cancelled=is_cancelled
        )
    steps = partial(_steps, engine, query_ids, writer, timeline=timeline, max_nodes=max_nodes)
    if engine.decodes_together:
        yield from steps()
    elif engine.is_owner:
        yield from _telling_others(engine, steps())
    else:
        yield from _told_by_owner(engine)


def _telling_others(engine: Engine, steps: Iterator[Step]) -> Iterator[Step]:
    """The owner's steps; the others get them now and then, lest a collective that waits for the
    end of a long answer time out, and at the end, also of an answer given up.
    """
    untold: list[Step] = []
    told_at = time.monotonic()

    def tell_end(failure: str | None = None) -> None:
        told = {"steps": untold, "state": [engine.step, engine.next_position], "failure": failure}
        engine.comm.all_gather_json(told, _FROM_OWNER)

    try:
        for step in steps:
            untold.append(step)
            yield step
            if time.monotonic() - told_at > _INSTALMENT_S:
                engine.comm.all_gather_json({"steps": untold}, _FROM_OWNER)
                untold, told_at = [], time.monotonic()
    except NotFiniteError as error:
        tell_end(str(error))
        raise
    except GeneratorExit:
        tell_end()
        raise
    tell_end()  # any other error ends this rank, which is how the others learn of it


def _told_by_owner(engine: Engine) -> Iterator[Step]:
    told: dict[str, Any] = {}
    while "state" not in told:
        told = _heard(engine)
        try:
            yield from (Step(*step) for step in told["steps"])
        except GeneratorExit:  # this rank's caller gives up; what the owner says is still due
            while "state" not in told:
                told = _heard(engine)
            raise
    if told["failure"] is not None:
        raise NotFiniteError(told["failure"])


def _heard(engine: Engine) -> dict[str, Any]:
    """An instalment of the owner's; the last one says where its engine stands."""
    told: dict[str, Any] = engine.comm.all_gather_json(None, _FROM_OWNER)[OWNER]
    if "state" in told:
        engine.step, engine.next_position = told["state"]
    return told


def _steps(
    engine: Engine,
    query_ids: Sequence[int],
    writer: _Writer | None,
    *,
    timeline: Timeline,
    max_nodes: int,
) -> Iterator[Step]:
    with timeline.phase(Phase.QUERY):
        hidden_TM = engine.extend(query_ids)
        read = writer.read_query(engine, hidden_TM) if writer else None
        outcome = _told(engine, max_nodes, read)
    yield from _emitted(outcome, engine.next_position - 1)
    while outcome.verdict is Verdict.CONTINUE:
        with timeline.phase(Phase.STEP) as scope:
            tree, position, started = outcome.tree, engine.next_position, time.perf_counter()
            with timeline.trace.span(Phase.PASS):
                hidden_NM = engine.read_tree(tree)
            read = writer.read_tree(engine, tree, hidden_NM, started) if writer else None
            outcome = _told(engine, max_nodes, read)
            engine.keep(outcome.path)
            scope.tell(nodes=len(tree), tokens=len(outcome.token_ids))
            timeline.trace.sample()
        yield from _emitted(outcome, position)


def _told(engine: Engine, max_nodes: int, outcome: Outcome | None) -> Outcome:
    """The owner's outcome on every rank that decodes."""
    if engine.decode_comm.world_size == 1:
        assert outcome is not None, "only the owner decodes alone"
        return outcome
    packed = [0] * _packed_size(max_nodes) if outcome is None else outcome.packed(max_nodes)
    tag = Tag(engine.step, 0, Kind.CONTROL)
    told = engine.decode_comm.broadcast_ints(packed, tag, src=OWNER)
    # The owner keeps its own: only there does the tree say what it was drawn from.
    return Outcome.unpacked(told) if outcome is None else outcome


def _emitted(outcome: Outcome, position: int) -> Iterator[Step]:
    """The tokens of a forward pass from a position on; the last one says why it is the last."""
    if outcome.verdict is Verdict.NOT_FINITE:
        yield from (Step(token_id, None) for token_id in outcome.token_ids)
        raise NotFiniteError.at(position + len(outcome.token_ids))
    *earlier, last = outcome.token_ids
    yield from (Step(token_id, None) for token_id in earlier)
    ends = outcome.verdict is not Verdict.CONTINUE
    yield Step(last, outcome.verdict.name.lower() if ends else None)


class _Writer:
    """The owner's part of decoding one answer: chooses tokens and drafts what is read next."""

    def __init__(
        self,
        params: SamplingParams,
        speculator: Speculator | None,
        trace: Trace,
        *,
        is_last: Callable[[int], bool],
        is_cancelled: Callable[[], bool],
    ) -> None:
        self._sampler, self._speculator, self._trace = Sampler(params), speculator, trace
        self._walk = accept if speculator is None else speculator.verifier.walk
        self._left = params.max_tokens
        self._is_last, self._is_cancelled = is_last, is_cancelled

    def read_query(self, engine: Engine, hidden_TM: Tensor) -> Outcome:
        logits_1V = engine.model.logits(hidden_TM[-1:])
        root = DraftTree.of_root(0)  # stands for the question's last token
        outcome = self._judge(root, accept(root, logits_1V, self._sampler))._replace(path=())
        if self._speculator is not None and outcome.verdict is Verdict.CONTINUE:
            stop = engine.next_position
            self._speculator.read(range(stop - hidden_TM.shape[0], stop))
            self._speculator.first(outcome.token_ids[-1])
        return self._with_draft(outcome)

    def read_tree(
        self, engine: Engine, tree: DraftTree, hidden_NM: Tensor, started: float
    ) -> Outcome:
        with self._trace.span(Phase.CHOOSE):
            logits_NV = engine.model.logits(hidden_NM)
            walk = self._walk(tree, logits_NV, self._sampler)
            outcome = self._judge(tree, walk)
        with self._trace.span(Phase.DRAFT):
            if self._speculator is not None and outcome.verdict is not Verdict.NOT_FINITE:
                states_NE = self._speculator.states()
                verified = Verified(tree, walk.path, outcome.token_ids, logits_NV, states_NE)
                self._speculator.observe(verified, started=started)
            return self._with_draft(outcome)

    def _judge(self, tree: DraftTree, walk: Walk) -> Outcome:
        """How the answer goes on; tokens behind its last one are dropped."""
        token_ids = [tree.tokens[node] for node in walk.path[1:]]
        if walk.token_id is not None:
            token_ids.append(walk.token_id)
        for count, token_id in enumerate(token_ids, start=1):
            verdict = self._verdict(token_id)
            if verdict is not Verdict.CONTINUE:
                return Outcome(verdict, tuple(token_ids[:count]), walk.path, tree)
        verdict = Verdict.NOT_FINITE if walk.token_id is None else Verdict.CONTINUE
        return Outcome(verdict, tuple(token_ids), walk.path, tree)

    def _verdict(self, token_id: int) -> Verdict:
        self._left -= 1
        if self._is_last(token_id):
            return Verdict.STOP
        if self._left == 0:
            return Verdict.LENGTH
        return Verdict.CANCELLED if self._is_cancelled() else Verdict.CONTINUE

    def _with_draft(self, outcome: Outcome) -> Outcome:
        """With the tree that the next forward pass reads, if there is one."""
        if outcome.verdict is not Verdict.CONTINUE:
            return outcome
        tree = DraftTree.of_root(outcome.token_ids[-1])
        if self._speculator is not None:
            # No larger than what is left: the cache has no room for more.
            tree = self._speculator.propose(outcome.token_ids[-1], room=self._left)
        return outcome._replace(tree=tree)
