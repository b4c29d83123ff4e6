"""The owner's side of speculation: drafts, learns from what was verified, survives its drafter."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from apb.sampling import SamplingParams
from apb.speculate.base import Drafter, DrafterConfig, DraftRequest, DraftTarget, Verified
from apb.speculate.control import (
    FixedController,
    LengthController,
    StepReport,
    build_controller,
)
from apb.speculate.tree import DraftTree, TreeBuilder
from apb.speculate.verify import build_verifier

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class SpeculationStats:
    """Of one request."""

    steps: int = 0
    """Forward passes of the target after the one that read the question."""
    emitted: int = 0
    """Tokens that these steps yielded."""
    nodes: int = 0
    draft_s: float = 0.0

    @property
    def acceptance_length(self) -> float:
        return self.emitted / self.steps if self.steps else 1.0


class Speculator:
    """Drafts for one request after the other on the owner.

    A drafter that fails is dropped for the rest of the request with a warning, and the answer goes
    on without it.
    """

    def __init__(self, config: DrafterConfig, target: DraftTarget) -> None:
        """Raises InputError where the drafter cannot be built, or its verifier is not exact."""
        self._config = config
        self._built = config.build_drafter(target)
        proposed = frozenset() if self._built is None else self._built.proposes
        self.verifier = build_verifier(config.verifier, proposed)
        self._tap = None
        if self._built is not None and self._built.needs.anything:
            self._tap = target.tap(self._built.needs)
        # With a team of threads of its own, the drafter's thread would make OpenMP put the target's
        # to sleep after each operation: a third of a decoding step on 2 cores, also when it idles.
        self._pool = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="drafter",
            initializer=torch.set_num_threads,
            initargs=(1,),
        )
        self._drafter: Drafter | None = None
        self._ready: Future[None] | None = None
        self._missed: list[Callable[[Drafter], None]] = []
        # Kept from request to request: what it has measured is mostly about the machine.
        self._adaptive = build_controller(config.controller, config.max_nodes)
        self._controller: LengthController = FixedController(1)
        self._allowed, self._drafted, self._draft_s = 1, DraftTree.of_root(0), 0.0
        self._repeatable = False
        self.stats = SpeculationStats()

    def begin(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Start preparing for a request, beside whatever comes next."""
        self.stats, self._missed = SpeculationStats(), []
        self._drafter = self._built
        # Then the sampled tokens depend on the trees, and a seed promises the same tokens again.
        sampled = sampling.seed is not None and sampling.temperature > 0.0
        self._repeatable = sampled and not self.verifier.follows_plain
        if self._drafter is not None:
            fixed = FixedController(self._config.max_nodes)
            self._controller = fixed if self._repeatable else self._adaptive
            request = DraftRequest(prompt_ids, sampling)
            self._ready = self._pool.submit(self._drafter.begin, request)

    def wait(self) -> None:
        """Return when the drafter is prepared, or has failed to."""
        if self._ready is not None:
            self._ready.exception()

    def read(self, positions: Sequence[int], own: slice = slice(None)) -> None:
        """The target has run tokens of the prompt at those positions; `own` are not copies."""
        if self._tap is None:
            return
        rows, states_TE = self._tap.take()
        inside = range(*own.indices(len(positions)))
        kept = sorted((positions[row], i) for i, row in enumerate(rows) if row in inside)
        if kept:
            where, order = zip(*kept, strict=True)
            self._tell(lambda drafter: drafter.read(where, states_TE[list(order)]))

    def first(self, token_id: int) -> None:
        """The token that followed the question."""
        if self._repeatable:
            self.wait()
        self._tell(lambda drafter: drafter.observe([token_id], None))

    def states(self) -> Tensor | None:
        """What the drafter wants to know of the target's last pass."""
        return None if self._tap is None else self._tap.take().states_TE

    def propose(self, root: int, *, room: int) -> DraftTree:
        """A tree that grows from the last token, of at most `room` nodes.

        It is the root alone while the drafter still prepares. Where a seed has to give the same
        tokens again and the verifier's choice depends on the tree, nothing here depends on time:
        the drafter is waited for, and trees are always as large as they may be.
        """
        started = time.perf_counter()
        tree = self._drafted = DraftTree.of_root(root)
        self._allowed = max(1, min(room, self._controller.max_nodes()))
        self._catch_up()
        if self._allowed > 1 and self._is_ready:

            def grow(drafter: Drafter) -> DraftTree:
                builder = TreeBuilder(root, max_nodes=self._allowed)
                drafter.extend_tree(builder, source=1)
                drafted = self._drafted = builder.build()
                if not drafted.proposals:  # drawn nodes may not be left out for what they hold
                    drafted = self._controller.choose(drafted, self._allowed)
                self.verifier.check(drafted)
                return drafted

            tree = self._tried(grow) or tree
        self._draft_s = time.perf_counter() - started
        self.stats.draft_s += self._draft_s
        return tree

    def observe(self, verified: Verified, *, started: float) -> None:
        """A step over the last proposed tree, which began at that `time.perf_counter`."""
        begin = time.perf_counter()
        self._tell(lambda drafter: drafter.observe(verified.new_ids, verified))
        learning_s = time.perf_counter() - begin
        self.stats.steps += 1
        self.stats.emitted += len(verified.new_ids)
        self.stats.nodes += len(verified.tree)
        self.stats.draft_s += learning_s
        report = StepReport(
            allowed=self._allowed,
            num_nodes=len(verified.tree),
            path=verified.path,
            seconds=begin - started,
            draft_s=self._draft_s + learning_s,
            pool=self._drafted,
            emitted=verified.new_ids,
        )
        self._controller.update(report)

    def _tell(self, news: Callable[[Drafter], None]) -> None:
        """Now, or when the drafter is prepared: in order."""
        self._missed.append(news)
        self._catch_up()

    def _catch_up(self) -> None:
        if self._is_ready:
            missed, self._missed = self._missed, []
            for one in missed:
                self._tried(one)

    @property
    def _is_ready(self) -> bool:
        return self._ready is not None and self._ready.done()

    def _tried(self, use: Callable[[Drafter], T]) -> T | None:
        """What the drafter returns; None where there is none, or it fails."""
        if self._drafter is None or self._ready is None:
            return None
        try:
            self._ready.result()
            return use(self._drafter)
        except Exception:
            # Whatever is wrong with it, the target needs no drafter to go on.
            _log.warning("the drafter failed; the answer goes on without it", exc_info=True)
            self._drafter, self._controller = None, FixedController(1)
            return None
