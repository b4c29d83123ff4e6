"""Drafts by an EAGLE head, with its own vocabulary or the target's.

Letters: T rows of a pass, M hidden size, E width of the target's states, F half a head, V the
target's vocabulary, C tokens that are scored, W nodes of a level, N drafted rows, X nodes that were
looked at.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from apb.errors import InputError
from apb.packed import has_fast_bf16, pack_linears
from apb.rotary import Rotary
from apb.speculate.base import (
    Drafter,
    DrafterConfig,
    DraftRequest,
    DraftTarget,
    Needs,
    Verified,
)
from apb.speculate.eagle_cache import Window, WindowedCache
from apb.speculate.eagle_checkpoint import EagleCheckpoint
from apb.speculate.eagle_head import EagleHead, HeadOutput
from apb.speculate.eagle_levels import Considered, Level
from apb.speculate.eagle_options import HeadSettings, RopeSource, TargetFacts
from apb.speculate.lm_head import LmHead
from apb.speculate.tree import TreeBuilder

_log = logging.getLogger(__name__)

SHIPPED_HEAD = "eagle"
"""The folder of a head within what is shipped for a model."""


class EagleDrafter(Drafter):
    """EAGLE with dynamic trees (EAGLE-2, Li et al. 2024, https://arxiv.org/abs/2406.16858).

    The head's likeliest continuations are expanded level by level, and of all that were looked at
    the likeliest make up the tree.
    """

    def __init__(
        self,
        head: EagleHead,
        cache: WindowedCache,
        *,
        needs: Needs,
        embedding_VM: Tensor,
        lm_head_for: Callable[[Sequence[int]], LmHead],
        depth: int,
        topk: int,
        min_chance: float,
    ) -> None:
        """`lm_head_for` gives the rows for a prompt. The cache is the drafter's alone."""
        self.needs = needs
        self._head, self._cache, self._dtype = head, cache, cache.dtype
        self._embedding_VM, self._lm_head_for = embedding_VM, lm_head_for
        self._lm_head: LmHead | None = None
        self._depth, self._topk = depth, topk
        self._least = math.log(min_chance) if min_chance > 0 else -math.inf
        self._tokens: list[int] = []
        self._unread: list[tuple[list[int], Tensor]] = []
        self._last: HeadOutput | None = None

    @torch.inference_mode()
    def begin(self, request: DraftRequest) -> None:
        self._lm_head = None  # two at once may not fit
        self._lm_head = self._lm_head_for(request.prompt_ids)
        self._tokens, self._unread, self._last = list(request.prompt_ids), [], None
        self._cache.clear()

    def read(self, positions: Sequence[int], states_TE: Tensor) -> None:
        self._unread.append((list(positions), states_TE))

    @torch.inference_mode()
    def observe(self, new_ids: Sequence[int], verified: Verified | None) -> None:
        root = len(self._tokens) - 1
        self._tokens += new_ids
        self._last = None
        if verified is not None and verified.states_NE is not None:
            # A node's state is paired with the token behind it, and so the last one's with none
            # where the answer ended before.
            path = list(verified.path[: len(new_ids)])
            positions = list(range(root, root + len(path)))
            self._unread.append((positions, verified.states_NE[path]))
            if len(self._unread) > self._cache.max_rows:
                self._read_on()  # nothing is being drafted, and states are not to pile up

    @torch.inference_mode()
    def extend_tree(self, tree: TreeBuilder, *, source: int) -> None:
        if self._unread:
            self._read_on()
        if self._last is not None and not tree.is_full:
            self._looked_at(self._last, tree.room).add_to(tree, source=source)

    def _read_on(self) -> None:
        """Run the head over all pairs of a state and the token behind it that are new.

        Only now, when they are needed: the first answer does not wait for the prompt's. Tokens
        whose states nobody has told are left out, and nothing is drafted where the last one's is.
        """
        unread, self._unread = self._unread, []
        newest = len(self._tokens) - 2
        positions_T = torch.tensor([p for rows, _ in unread for p in rows], dtype=torch.int64)
        seen_T = self._cache.window.shows(positions_T, newest)
        if not bool(seen_T.any()):
            return
        positions_T = positions_T[seen_T]
        ids_T = torch.tensor([self._tokens[position + 1] for position in positions_T.tolist()])
        device, size = self._embedding_VM.device, self._cache.max_rows
        states_TE = torch.cat([states_TE for _, states_TE in unread])[seen_T.to(device)]
        chunks = (rows.to(device).split(size) for rows in (ids_T, positions_T, states_TE))
        for ids_T, positions_T, states_TE in zip(*chunks, strict=True):
            states_TM = self._head.combined(states_TE.to(self._dtype))
            attend = self._cache.extend(positions_T)
            embeds_TM = self._embedded(ids_T)
            output = self._head(embeds_TM, states_TM, positions_T, attend, wanted=slice(-1, None))
        if int(positions_T[-1]) == newest:
            self._last = output

    def _looked_at(self, last: HeadOutput, room: int) -> Considered:
        """Levels of likely tokens, until no deeper one can be among the `room` best."""
        width, root = min(self._topk, room), len(self._tokens) - 1
        considered = Considered()
        level = self._first_level(last, width, considered)
        for position in range(root, root + min(self._depth, room) - 1):
            best = float(level.scores_W[0])
            if best < self._least or best <= considered.score_of(room):
                break
            level = self._next_level(level, position, width, considered)
        return considered

    def _first_level(self, last: HeadOutput, width: int, considered: Considered) -> Level:
        logprobs_1W, ids_1W = self._scored(last.for_logits_TM, width)
        ids_W, scores_W = ids_1W[0], logprobs_1W[0]
        nodes_W = considered.add(ids_W, scores_W, torch.full_like(ids_W, -1))
        visible_WN = torch.eye(len(ids_W), dtype=torch.bool, device=ids_W.device)
        states_WM = last.states_TM.expand(len(ids_W), -1)
        return Level(ids_W, scores_W, nodes_W, states_WM, visible_WN)

    def _next_level(self, level: Level, position: int, width: int, considered: Considered) -> Level:
        """`position` is that of the token before the level's nodes."""
        attend = self._cache.draft(position, level.visible_WN)
        positions_W = torch.full_like(level.ids_W, position)
        output = self._head(self._embedded(level.ids_W), level.states_WM, positions_W, attend)
        logprobs_WC, ids_WC = self._scored(output.for_logits_TM, width)
        ids_X, scores_X = ids_WC.flatten(), (level.scores_W[:, None] + logprobs_WC).flatten()
        parents_X = level.nodes_W[:, None].expand_as(ids_WC).flatten()
        nodes_X = considered.add(ids_X, scores_X, parents_X)
        best = scores_X.topk(min(width, len(scores_X)))
        rows_W = best.indices // ids_WC.shape[1]
        itself_WW = torch.eye(len(rows_W), dtype=torch.bool, device=rows_W.device)
        return Level(
            ids_X[best.indices],
            best.values,
            nodes_X[best.indices],
            output.states_TM[rows_W],
            torch.cat((level.visible_WN[rows_W], itself_WW), dim=1),
        )

    def _embedded(self, ids_T: Tensor) -> Tensor:
        return F.embedding(ids_T, self._embedding_VM).to(self._dtype)

    def _scored(self, x_TM: Tensor, count: int) -> tuple[Tensor, Tensor]:
        assert self._lm_head is not None, "extend_tree before begin"
        return self._lm_head.best(x_TM, count)


@dataclass(kw_only=True, slots=True)
class EagleConfig(DrafterConfig):
    """Config of `EagleDrafter`, with the head's own vocabulary or the target's.

    Attributes:
        head: folder of the head, as EAGLE, FR-Spec, SGLang, vLLM, speculators, SpecForge or NeMo
            write it; empty is the one that apb ships for the model.
        depth: tokens on a path of the tree at most.
        topk: children looked at of each node, and nodes expanded of each level.
        min_chance: levels are looked at behind nodes that are likelier than this alone, a rule
            like Kangaroo's (https://arxiv.org/abs/2404.18911).
        sinks: first tokens of the prompt that the head sees.
        window: last tokens of the text that it sees.
        rope: whose rotary embedding it uses; None is the target's for EAGLE-1/2, else its own.
        entering: layers of the target whose incoming states an EAGLE-3 head reads.
        norm_before_residual: of EAGLE-3; None is what the head's files say.
        norm_output: of EAGLE-3.1; None is what the head's files say.
        bf16: draft in bfloat16 where the device multiplies it fast, also beside an fp32 target.
    """

    head: str = ""
    depth: int = 5
    topk: int = 8
    min_chance: float = 0.1
    sinks: int = 4
    window: int = 1024
    rope: RopeSource | None = None
    entering: list[int] | None = None
    norm_before_residual: bool | None = None
    norm_output: bool | None = None
    bf16: bool = False

    def __post_init__(self) -> None:
        DrafterConfig.__post_init__(self)
        for name, least in (("depth", 1), ("topk", 1), ("sinks", 0), ("window", self.depth + 1)):
            if getattr(self, name) < least:
                raise InputError(f"drafter.{name}={getattr(self, name)} must be at least {least}")
        if not 0.0 <= self.min_chance < 1.0:
            raise InputError(f"drafter.min_chance={self.min_chance} must lie between 0 and 1")

    def build_drafter(self, target: DraftTarget) -> EagleDrafter:
        checkpoint = self.checkpoint(target)
        weight_CM, ids_C = checkpoint.lm_head_CM, checkpoint.ids_C
        if weight_CM is None:
            head_VM = target.head()
            weight_CM = head_VM if ids_C is None else head_VM[ids_C.to(head_VM.device)]
        weight_CM = weight_CM.to(target.device, self.dtype(target))
        lm_head = LmHead(weight_CM, None if ids_C is None else ids_C.to(target.device))
        return self.drafter(target, checkpoint, lambda prompt_ids: lm_head)

    def dtype(self, target: DraftTarget) -> torch.dtype:
        """That of the head and of the rows that it scores."""
        half = self.bf16 and has_fast_bf16(target.device)
        return torch.bfloat16 if half else target.dtype

    def checkpoint(self, target: DraftTarget) -> EagleCheckpoint:
        folder = Path(self.head)
        if not self.head and target.drafting is not None:
            folder = target.drafting / SHIPPED_HEAD
        elif not self.head:
            raise InputError(
                "drafter.head is not set, and apb ships none for this model: give the folder of an "
                "EAGLE head that was trained for it"
            )
        vocab_size, hidden_size = target.head().shape
        facts = TargetFacts(
            hidden_size=hidden_size,
            vocab_size=vocab_size,
            num_layers=target.num_layers,
            rotary=target.rotary,
            tokenizer_hash=target.tokenizer_hash,
        )
        settings = HeadSettings(
            rope=self.rope,
            entering=None if self.entering is None else tuple(self.entering),
            norm_before_residual=self.norm_before_residual,
            norm_output=self.norm_output,
        )
        checkpoint = EagleCheckpoint.read(folder, facts, settings)
        _log.info("EAGLE head %s: %s", folder, checkpoint.options)
        return checkpoint

    def drafter(
        self,
        target: DraftTarget,
        checkpoint: EagleCheckpoint,
        lm_head_for: Callable[[Sequence[int]], LmHead],
    ) -> EagleDrafter:
        device, dtype = target.device, self.dtype(target)
        head = checkpoint.head.to(device, dtype).requires_grad_(False)
        pack_linears(head)
        inv_freq_F, scaling = head.rotary
        head.rotary = Rotary(inv_freq_F.to(device, torch.float32), scaling)
        entering = checkpoint.options.entering.value
        window = Window(self.sinks, self.window)
        rows = self.topk * (self.depth - 1)
        return EagleDrafter(
            head,
            WindowedCache(head.shape, window, max_drafted=rows, device=device, dtype=dtype),
            needs=Needs(final=not entering, entering=entering, first=self.sinks, last=self.window),
            embedding_VM=_embedding(checkpoint, target),
            lm_head_for=lm_head_for,
            depth=self.depth,
            topk=self.topk,
            min_chance=self.min_chance,
        )


def _embedding(checkpoint: EagleCheckpoint, target: DraftTarget) -> Tensor:
    """The target's, where the checkpoint's is a copy of it or missing."""
    shared_VM, own_VM = target.embedding(), checkpoint.embedding_VM
    if own_VM is None:
        return shared_VM
    own_VM = own_VM.to(target.device, target.dtype)
    return shared_VM if torch.equal(own_VM, shared_VM) else own_VM
