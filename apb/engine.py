"""The story of a request on one rank: prefill the context, read the query, decode.

Every rank runs the same steps. Rank 0, the owner, holds the new tokens' KV, chooses tokens and
tells the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from apb.attention.base import AttentionBackend, LayerInputs
from apb.cache import CacheShape, KVCacheShard
from apb.comm import Communicator, Kind, Tag
from apb.errors import RequestError
from apb.methods.base import Attend, AttentionMethod, PrefillContext
from apb.methods.decode import OWNER, ShardedDecode
from apb.methods.plan import PrefillPlan
from apb.metrics import Timeline
from apb.prompts.base import PromptTokens
from apb.sampling import Sampler, SamplingParams

_LOGIT_ROWS = 256
"""Rows whose logits are held at once when scoring: 256 rows of 128K logits are 128 MiB."""


class TargetModel(Protocol):
    """What the engine needs of a model."""

    @property
    def device(self) -> torch.device: ...
    @property
    def cache_shape(self) -> CacheShape: ...
    def forward(self, token_ids: Sequence[int], positions_T: Tensor, attend: Attend) -> Tensor: ...
    def logits(self, hidden_TM: Tensor) -> Tensor: ...


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


class Engine:
    """Runs one request at a time; all ranks call the same methods in the same order."""

    def __init__(
        self,
        *,
        model: TargetModel,
        method: AttentionMethod,
        backend: AttentionBackend,
        comm: Communicator,
        on_layer: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._method, self._backend, self._comm = model, method, backend, comm
        self._on_layer = on_layer
        self._step = 0
        self._cache: KVCacheShard | None = None
        self._decode: ShardedDecode | None = None
        self._next_position = 0

    def prefill(self, prompt: PromptTokens, plan: PrefillPlan, *, room: int) -> None:
        """Fill the sharded cache with the context. The query only steers the anchor here.

        Args:
            prompt: the context and the query that steers the compression (may be empty).
            plan: from `AttentionMethod.plan`, the same on every rank.
            room: how many new tokens the owner must be able to cache afterwards.
        """
        rank = self._comm.rank
        rows = plan.rows(rank, prompt.context_ids, prompt.query_ids)
        self.release()
        self._cache = KVCacheShard(
            self._model.cache_shape,
            capacity=plan.layout.tokens_on(rank) + (room if rank == OWNER else 0),
            device=self._model.device,
        )
        context = PrefillContext(
            plan=plan,
            rows=rows,
            cache=self._cache,
            comm=self._comm,
            backend=self._backend,
            step=self._next_step(),
        )
        positions_T = torch.tensor(rows.positions, dtype=torch.int64, device=self._model.device)
        attend = self._method.begin(context)
        self._model.forward(rows.token_ids, positions_T, self._observed(attend))
        self._comm.verify()
        self._cache.commit(positions_T[rows.local])
        self._decode = ShardedDecode(self._cache, self._comm, self._backend)
        self._next_position = plan.layout.context_len

    def extend(self, token_ids: Sequence[int]) -> Tensor:
        """Hidden states ``[T, M]`` of new tokens, which see the context and causally each other."""
        assert self._cache is not None, "extend before prefill"
        assert self._decode is not None
        positions_T = torch.arange(
            self._next_position, self._next_position + len(token_ids), device=self._model.device
        )
        self._decode.step = self._next_step()
        hidden_TM = self._model.forward(token_ids, positions_T, self._decode.attend)
        self._comm.verify()
        if self._decode.is_owner:
            self._cache.commit(positions_T)
        self._next_position += len(token_ids)
        return hidden_TM

    def rewind(self, num_tokens: int) -> None:
        """Forget the last `num_tokens` tokens that `extend` has read."""
        assert self._cache is not None, "rewind before prefill"
        if self._is_owner:
            self._cache.truncate(len(self._cache) - num_tokens)
        self._next_position -= num_tokens

    def generate(
        self,
        query_ids: Sequence[int],
        params: SamplingParams,
        *,
        timeline: Timeline,
        is_last: Callable[[int], bool],
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> Iterator[Step]:
        """Read the query and decode; `prefill` has run with room for both.

        Args:
            query_ids: all query tokens, at least one.
            params: the sampler's settings; `max_tokens` at most.
            timeline: gets the phases `query` and `decode`.
            is_last: the owner's word on whether a token ends the answer (stop ids and strings).
            is_cancelled: asked on the owner before each token.

        Raises:
            RequestError: the logits are not finite, on every rank.
        """
        sampler = Sampler(params)
        pending: Sequence[int] = query_ids
        for index in range(params.max_tokens):
            with timeline.phase("decode" if index else "query"):
                hidden_TM = self.extend(pending)
                token_id, verdict = self._choose(hidden_TM[-1:], sampler)
                if verdict is Verdict.CONTINUE and self._is_owner:
                    if is_last(token_id):
                        verdict = Verdict.STOP
                    elif index + 1 == params.max_tokens:
                        verdict = Verdict.LENGTH
                    elif is_cancelled():
                        verdict = Verdict.CANCELLED
                tag = Tag(self._step, 0, Kind.CONTROL)
                token_id, code = self._comm.broadcast_ints([token_id, verdict], tag, src=OWNER)
            if code == Verdict.NOT_FINITE:
                raise RequestError(_not_finite(self._next_position - 1))
            if code != Verdict.CONTINUE:
                yield Step(token_id, Verdict(code).name.lower())
                return
            yield Step(token_id, None)
            pending = [token_id]

    def logprobs(self, token_ids: Sequence[int], targets: Sequence[int]) -> list[float]:
        """Log-probability of ``targets[i]`` after ``token_ids[i]``; `prefill` has run with room.

        Raises:
            RequestError: the logits are not finite, on every rank.
        """
        hidden_TM = self.extend(token_ids)
        values: list[float] = []
        finite = True
        if self._is_owner:
            targets_T = torch.tensor(targets, dtype=torch.int64, device=hidden_TM.device)
            for rows_TM, wanted_T in zip(
                hidden_TM.split(_LOGIT_ROWS), targets_T.split(_LOGIT_ROWS), strict=True
            ):
                logits_TV = self._model.logits(rows_TM)
                finite = finite and bool(logits_TV.isfinite().all())
                chosen_T = logits_TV.log_softmax(dim=-1).gather(1, wanted_T[:, None])[:, 0]
                values += chosen_T.tolist()
        tag = Tag(self._step, 0, Kind.CONTROL)
        (finite_code,) = self._comm.broadcast_ints([int(finite)], tag, src=OWNER)
        if not finite_code:
            raise RequestError(_not_finite(self._next_position - 1))
        result: list[float] = self._comm.all_gather_json(values, tag)[OWNER]
        return result

    def report(self, value: dict[str, int]) -> list[dict[str, int]]:
        """Every rank's `value`, in rank order, on every rank."""
        return self._comm.all_gather_json(value, Tag(self._next_step(), 0, Kind.REPORT))

    def release(self) -> None:
        """Give the cache's memory back."""
        self._cache = self._decode = None

    @property
    def _is_owner(self) -> bool:
        return self._comm.rank == OWNER

    def _choose(self, hidden_1M: Tensor, sampler: Sampler) -> tuple[int, Verdict]:
        if not self._is_owner:
            return 0, Verdict.CONTINUE
        logits_V = self._model.logits(hidden_1M)[0]
        if not bool(logits_V.isfinite().all()):
            return 0, Verdict.NOT_FINITE
        return sampler(logits_V), Verdict.CONTINUE

    def _observed(self, attend: Attend) -> Attend:
        def observed(layer: LayerInputs) -> Tensor:
            out_THD = attend(layer)
            self._on_layer()
            return out_THD

        return observed

    def _next_step(self) -> int:
        self._step += 1
        return self._step


def _not_finite(position: int) -> str:
    return (
        f"the logits at position {position} are not finite: the model overflowed, so try "
        "dtype=float32 or check its weights"
    )
