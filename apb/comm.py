"""The only module that moves tensors between ranks. Every message says what it is and is checked.

gloo and NCCL both accept a rank that skipped a collective and hand out another layer's bytes as if
nothing had happened. So each buffer travels behind a 128-byte header (step, layer, kind, source,
dtype, shape) and the receiver compares it with what it waits for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from apb.errors import PeerLostError
from apb.header import (
    HEADER_BYTES,
    Kind,
    Tag,
    header_fields,
    mismatch,
    packed_header,
    payload_of,
)
from apb.heartbeat import Pulse
from apb.trace.recorder import OFF, Trace

__all__ = ["HEADER_BYTES", "Communicator", "Kind", "Pending", "Tag"]

T = TypeVar("T")
# torch 2.13 renamed it and warns on every call of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending(Generic[T]):
    """A message under way. `wait` returns what was received; it may be called more than once."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish
        self._result: T | None = None

    def wait(self) -> T:
        if self._finish is not None:
            self._result, self._finish = self._finish(), None
        return cast(T, self._result)


class _UnderWay(NamedTuple):
    """What torch has begun, and when."""

    works: Sequence[Any] = ()
    posted: Any = None


@dataclass(slots=True)
class Communicator:
    """The collectives that apb uses. A world of one rank never touches torch.distributed."""

    rank: int
    world_size: int
    device: torch.device
    bytes_received: int = 0
    defer_checks: bool = False
    """Leave the headers to `verify` instead of looking at each on arrival."""
    pulse: Pulse | None = None
    """Is told while this rank waits for others."""
    control: dist.ProcessGroup | None = None
    """A group of its own for `agree`, where the default one is not gloo or may fall out of step."""
    trace: Trace = OFF
    """Is told of every message."""
    _unverified: list[tuple[list[tuple[int, ...]], Tensor]] = field(default_factory=list)

    def all_gather(self, x: Tensor, tag: Tag) -> Pending[Tensor]:
        """Every rank's `x`, stacked in rank order: ``[R, *x.shape]``; the same shape everywhere."""
        if self.world_size == 1:
            return Pending(lambda: x[None])
        sent_U = self._pack(x, tag)
        received_RU = sent_U.new_empty((self.world_size, sent_U.numel()))
        begun = self._begin(
            tag, lambda: [_all_gather(received_RU.flatten(), sent_U, async_op=True)]
        )

        def finish() -> Tensor:
            self._await(tag, begun)
            return self._accept(received_RU, range(self.world_size), tag, x)

        return Pending(finish)

    def broadcast(self, x: Tensor, tag: Tag, *, src: int) -> Pending[Tensor]:
        """Rank `src`'s `x` on every rank. Elsewhere `x` only says shape and dtype."""
        if self.world_size == 1:
            return Pending(lambda: x)
        buffer_U = self._pack(x, tag, payload=self.rank == src)
        begun = self._begin(tag, lambda: [dist.broadcast(buffer_U, src=src, async_op=True)])

        def finish() -> Tensor:
            self._await(tag, begun)
            return self._accept(buffer_U[None], [src], tag, x)[0]

        return Pending(finish)

    def exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], tag: Tag
    ) -> Pending[dict[int, Tensor]]:
        """Send one tensor to each rank in `outgoing` and receive one from each in `incoming`.

        The tensors in `incoming` only say shape and dtype. Both sides have to agree on who sends to
        whom. Every rank that takes part has to `wait`, also one that only sends.
        """
        sent = {rank: self._pack(x, tag) for rank, x in outgoing.items()}
        received = {rank: self._buffer(x) for rank, x in incoming.items()}
        operations = [
            *(dist.P2POp(dist.isend, buffer_U, rank) for rank, buffer_U in sent.items()),
            *(dist.P2POp(dist.irecv, buffer_U, rank) for rank, buffer_U in received.items()),
        ]
        begun = _UnderWay()
        if operations:
            begun = self._begin(tag, lambda: dist.batch_isend_irecv(operations))

        def finish() -> dict[int, Tensor]:
            self._await(tag, begun)
            sent.clear()  # only now may the allocator have the memory back
            return {
                rank: self._accept(buffer_U[None], [rank], tag, incoming[rank])[0]
                for rank, buffer_U in received.items()
            }

        return Pending(finish)

    def broadcast_ints(self, values: Sequence[int], tag: Tag, *, src: int) -> list[int]:
        """Rank `src`'s integers on every rank; all ranks pass the same number of them."""
        if self.world_size == 1:
            return list(values)
        x = torch.tensor(values, dtype=torch.int64, device=self.device)
        received = self.broadcast(x, tag, src=src).wait()
        self.verify()
        result: list[int] = received.tolist()
        return result

    def all_gather_json(self, value: Any, tag: Tag) -> list[Any]:
        """Every rank's JSON value, in rank order. Not pickle: peers are not trusted with code."""
        if self.world_size == 1:
            return [value]
        text_U = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([text_U.numel()], dtype=torch.int64, device=self.device)
        sizes = self.all_gather(size, tag).wait()
        self.verify()
        sizes_R: list[int] = sizes.flatten().tolist()
        padded_U = torch.zeros(max(sizes_R), dtype=torch.uint8, device=self.device)
        padded_U[: text_U.numel()] = text_U.to(self.device)
        texts_RU = self.all_gather(padded_U, tag).wait()
        self.verify()
        return [
            json.loads(text_U[:size].numpy().tobytes())
            for text_U, size in zip(texts_RU.cpu(), sizes_R, strict=True)
        ]

    def agree(self, value: int, *, src: int) -> Pending[int]:
        """Rank `src`'s small integer on every rank, beside the tensors' way and not counted."""
        if self.world_size == 1:
            return Pending(lambda: value)
        tag = Tag(0, 0, Kind.CONTROL)
        value_1 = torch.tensor([value], dtype=torch.uint8)
        begun = self._begin(
            tag, lambda: [dist.broadcast(value_1, src=src, group=self.control, async_op=True)]
        )

        def finish() -> int:
            self._await(tag, begun)
            return int(value_1)

        return Pending(finish)

    def _begin(self, tag: Tag, start: Callable[[], list[Any]]) -> _UnderWay:
        try:
            return _UnderWay(posted=self.trace.mark(), works=start())
        except RuntimeError as error:
            raise self._lost(tag, error) from error

    def _await(self, tag: Tag, begun: _UnderWay) -> None:
        if not begun.works:
            return
        if self.pulse is not None:
            self.pulse.wait(tag.step, tag.layer)
        began = self.trace.mark()
        try:
            for work in begun.works:
                work.wait()
        except RuntimeError as error:
            raise self._lost(tag, error) from error
        if self.pulse is not None:
            self.pulse.go_on()
        self.trace.waited(tag.kind.name.lower(), tag.step, tag.layer, begun.posted, began)

    def _lost(self, tag: Tag, error: RuntimeError) -> PeerLostError:
        reason = str(error).strip().splitlines()[0]
        name = tag.kind.name.lower()
        return PeerLostError(f"rank {self.rank} lost another rank in {name} messages: {reason}")

    def _buffer(self, x: Tensor) -> Tensor:
        """Room for a header and `x`."""
        nbytes = x.numel() * x.element_size()
        # Gathered rows start at multiples of 16 bytes, so that they can be viewed as any dtype.
        return torch.empty(
            HEADER_BYTES + -(-nbytes // 16) * 16, dtype=torch.uint8, device=self.device
        )

    def _pack(self, x: Tensor, tag: Tag, *, payload: bool = True) -> Tensor:
        buffer_U = self._buffer(x)
        header_U = packed_header(tag, self.rank, x)
        if self.device.type == "cuda":  # from pageable memory the copy would stall the stream
            header_U = header_U.pin_memory()
        buffer_U[:HEADER_BYTES].copy_(header_U, non_blocking=True)
        if payload:
            payload_of(buffer_U[None], x)[0].copy_(x)
        return buffer_U

    def _accept(
        self, received_RU: Tensor, sources: Sequence[int], tag: Tag, like: Tensor
    ) -> Tensor:
        """The payloads of messages that have arrived, one from each source."""
        others = [source for source in sources if source != self.rank]
        nbytes = len(others) * received_RU.shape[1]
        self.bytes_received += nbytes
        self.trace.received(nbytes, others)
        # A copy: a view would keep the whole message alive until it is checked.
        headers_RU = received_RU[:, :HEADER_BYTES].clone()
        self._unverified.append(
            ([header_fields(tag, source, like) for source in sources], headers_RU)
        )
        if not self.defer_checks:
            self.verify()
        return payload_of(received_RU, like)

    def settle(self, step: int, layer: int) -> None:
        """Wait until a GPU has done what it was given, and `verify`. All ranks at one place.

        Messages are part of what it was given, so this rank waits for others like those that have
        headers to look at; a rank that received nothing would seem to be at work.
        """
        if self.device.type == "cuda":
            if self.pulse is not None:
                self.pulse.wait(step, layer)
            torch.cuda.synchronize(self.device)
            if self.pulse is not None:
                self.pulse.go_on()
        self.verify()

    def verify(self) -> None:
        """Check the headers of all messages received since the last call.

        Where checks are not deferred this happens on arrival. On a GPU a look at a header would
        stall the stream, so the engine asks once per forward pass, before any result leaves the
        rank; control messages are always checked before they are used.

        Raises:
            EngineDeadError: a message is not the one that was waited for.
        """
        if not self._unverified:
            return
        expected = [fields for message, _ in self._unverified for fields in message]
        received_NU = torch.cat([headers_RU for _, headers_RU in self._unverified])
        self._unverified.clear()
        if self.pulse is not None and self.defer_checks:  # a GPU's stream is waited for only here
            self.pulse.wait(*expected[-1][1:3])
        received = received_NU.view(torch.int64).tolist()
        if self.pulse is not None and self.defer_checks:
            self.pulse.go_on()
        for wanted, fields in zip(expected, received, strict=True):
            if wanted != tuple(fields):
                raise mismatch(self.rank, wanted, fields)
