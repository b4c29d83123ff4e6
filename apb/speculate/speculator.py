"""The owner's side of speculation: drafts, learns from what was verified, survives its drafter."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from apb.speculate.base import Drafter, DrafterConfig, Verified
from apb.speculate.control import FixedController, LengthController, StepReport, build_controller
from apb.speculate.tree import DraftTree, TreeBuilder

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
    verify_s: float = 0.0
    accepted: Counter[int] = field(default_factory=Counter)
    """Nodes that were accepted, by the drafter that proposed them."""

    @property
    def acceptance_length(self) -> float:
        return self.emitted / self.steps if self.steps else 1.0


class Speculator:
    """Drafts for one request on the owner. A drafter that fails is dropped with a warning, and the
    answer goes on without it, the same.
    """

    def __init__(self, config: DrafterConfig) -> None:
        self._drafter: Drafter | None = config.build_drafter()
        self._controller: LengthController = (
            FixedController(1)
            if self._drafter is None
            else build_controller(config.controller, config.max_nodes)
        )
        self._ready: Future[None] | None = None
        self._allowed = 1
        self._drafted_s = 0.0
        self.stats = SpeculationStats()

    def begin(self, prompt_ids: Sequence[int]) -> None:
        """Start preparing, beside whatever comes next."""
        if self._drafter is not None:
            pool = ThreadPoolExecutor(max_workers=1)
            self._ready = pool.submit(self._drafter.begin, prompt_ids)
            pool.shutdown(wait=False)

    def propose(self, root: int, *, room: int) -> DraftTree:
        """A tree that grows from the last token, of at most `room` nodes."""
        started = time.perf_counter()
        self._allowed = max(1, min(room, self._controller.max_nodes()))
        tree = DraftTree.of_root(root)
        if self._allowed > 1:
            builder = TreeBuilder(root, max_nodes=self._allowed)
            if self._tried(lambda drafter: drafter.extend_tree(builder, source=1)):
                tree = builder.build()
        self._drafted_s = time.perf_counter() - started
        return tree

    def first(self, token_id: int) -> None:
        """The token that followed the question."""
        self._tried(lambda drafter: drafter.observe([token_id], None))

    def observe(self, verified: Verified, *, seconds: float) -> None:
        """A step over the last proposed tree took that long from one broadcast to the next."""
        self.stats.steps += 1
        self.stats.emitted += len(verified.path)
        self.stats.nodes += len(verified.tree)
        self.stats.draft_s += self._drafted_s
        self.stats.verify_s += seconds
        self.stats.accepted.update(verified.tree.sources[node] for node in verified.path[1:])
        self._controller.update(
            StepReport(self._allowed, len(verified.tree), verified.path, seconds + self._drafted_s)
        )
        self._tried(lambda drafter: drafter.observe(verified.new_ids, verified))

    def _tried(self, use: Callable[[Drafter], None]) -> bool:
        """Whether there is a drafter and it did not fail."""
        if self._drafter is None:
            return False
        try:
            if self._ready is not None:
                self._ready.result()
            use(self._drafter)
        except Exception:
            # Whatever is wrong with it, the target needs no drafter to go on.
            _log.warning("the drafter failed; the answer goes on without it", exc_info=True)
            self._drafter, self._controller = None, FixedController(1)
            return False
        return True
