"""One rank of `benchmarks.exchange`: exchanges of one layer, whose KV can be recognised."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apb.attention.base import LayerInputs
from apb.comm import Communicator, Kind, Tag
from apb.config import compose_config
from apb.cost import NOMINAL_CPU, NOMINAL_GPU, CostModel
from apb.errors import ApbError
from apb.hf.model import DTYPES
from apb.methods.exchange import ContextExchange, UpstreamRoom
from apb.methods.plan import AnchorForm, PlanRequest, PrefillPlan
from apb.methods.wire import Wire, WireFormat
from benchmarks.critical_path_variants import SHAPES

_BARRIER = Tag(0, 0, Kind.CONTROL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One prefill, of which the exchange of one layer is measured."""

    model: str
    context_len: int
    question_len: int
    dtype: str
    device: str
    """`cpu` or `cuda`; blocks are balanced by its nominal rates."""
    wire: str
    overrides: tuple[str, ...]
    repeats: int

    def plan(self, world_size: int) -> PrefillPlan:
        """Raises InputError where the settings do not fit."""
        config = compose_config(["model=tiny", "method=apb", *self.overrides])
        rates = NOMINAL_GPU if self.device == "cuda" else NOMINAL_CPU
        itemsize = DTYPES[self.dtype].itemsize
        request = PlanRequest(
            context_len=self.context_len,
            world_size=world_size,
            costs=CostModel(shape=SHAPES[self.model], rates=rates, itemsize=itemsize),
            query_len=self.question_len,
        )
        return config.method.build(seed=0).plan(request)


@dataclass(frozen=True, slots=True)
class Seconds:
    """Of each repeat, on one rank."""

    transfer: list[float]
    """From asking for what this rank needs until it was there."""
    unpack: list[float]
    """Then, until it could be attended to."""
    received_bytes: int
    """By this rank, in one exchange."""


def run_exchanges(comm: Communicator, cases: Sequence[Case]) -> list[Seconds]:
    """Every case on this rank; all ranks call it.

    Raises:
        ApbError: something else arrived than was sent.
    """
    return [_Layer(comm, case).measure(case.repeats) for case in cases]


def run_small(comm: Communicator, repeats: int) -> list[float]:
    """Seconds of exchanges of one number from every rank to all later ones."""
    number = torch.zeros(1, device=comm.device)
    outgoing = dict.fromkeys(range(comm.rank + 1, comm.world_size), number)
    incoming = dict.fromkeys(range(comm.rank), number)
    seconds = []
    for repeat in range(repeats + 1):
        _meet(comm)
        begin = time.perf_counter()
        comm.exchange(outgoing, incoming, Tag(1, repeat, Kind.UPSTREAM)).wait()
        _finish(comm)
        seconds.append(time.perf_counter() - begin)
    return seconds[1:]


class _Layer:
    """A layer whose passing blocks and anchor are drawn from the number of their block."""

    def __init__(self, comm: Communicator, case: Case) -> None:
        self._comm, self._case = comm, case
        self._plan = case.plan(comm.world_size)
        no_tokens = (0,) * case.context_len
        rows = self._plan.rows(comm.rank, no_tokens, (0,) * case.question_len)
        self._exchange = ContextExchange(
            self._plan, rows, comm, step=1, wire=WireFormat[case.wire], room=UpstreamRoom()
        )
        shape, dtype = SHAPES[case.model], DTYPES[case.dtype]
        self._kv = shape.num_kv_heads, shape.head_dim
        self._wire = Wire(WireFormat[case.wire], *self._kv, dtype)
        self._owned = [block.index for block in self._plan.layout.owned_by(comm.rank)]
        anchor_len = rows.anchor.stop
        k_KTD, v_KTD = (
            x_TKD.transpose(0, 1) for x_TKD in self._drawn(-1, anchor_len).unbind(dim=1)
        )
        self._inputs = LayerInputs(0, k_KTD, k_KTD, v_KTD, 1.0)

    def measure(self, repeats: int) -> Seconds:
        """After one exchange to warm up; that one and the last are compared with what was sent."""
        outbox = self._exchange.outbox(self._inputs)
        passing = [index for index in self._owned if self._plan.passing_lens[index]]
        rooms = [room for room in outbox.passing if len(room)]
        for index, room_P2KD in zip(passing, rooms, strict=True):
            room_P2KD.copy_(self._drawn(index, len(room_P2KD)))
        message_NY = self._exchange.message(self._inputs, outbox)
        transfer, unpack, received = list[float](), list[float](), 0
        for repeat in range(repeats + 1):
            _meet(self._comm)
            before = self._comm.bytes_received
            begin = time.perf_counter()
            pending = self._exchange.start(self._inputs, message_NY)
            pending.wait()
            _finish(self._comm)
            arrived = time.perf_counter()
            upstream = self._exchange.upstream(self._inputs, message_NY, pending)
            _finish(self._comm)
            transfer.append(arrived - begin)
            unpack.append(time.perf_counter() - arrived)
            received = self._comm.bytes_received - before
            if repeat in (0, repeats):
                self._check(*upstream)
        return Seconds(transfer[1:], unpack[1:], received)

    def _check(self, k_KUD: Tensor, v_KUD: Tensor) -> None:
        anchor_U2KD = self._drawn(-1, min(len(self._plan.anchor), k_KUD.shape[1]))
        if self._plan.anchor_form is AnchorForm.shared:
            anchor_U2KD = self._travelled(anchor_U2KD)
        last = self._plan.last_block(self._comm.rank)
        lens = self._plan.passing_lens
        passing = (self._travelled(self._drawn(index, lens[index])) for index in range(last))
        expected_U2KD = torch.cat([anchor_U2KD, *passing])
        found_U2KD = torch.stack([k_KUD, v_KUD]).permute(2, 0, 1, 3)
        if not torch.equal(found_U2KD, expected_U2KD):
            raise ApbError(
                f"rank {self._comm.rank} received other keys and values than were sent, so that "
                "speed means nothing"
            )

    def _travelled(self, kv_N2KD: Tensor) -> Tensor:
        return self._wire.decode(self._wire.encode(kv_N2KD))

    def _drawn(self, block: int, length: int) -> Tensor:
        """The keys and values ``[T, 2, K, D]`` of a block's passing tokens; -1 is the anchor."""
        generator = torch.Generator().manual_seed(1000 + block)
        values = torch.randn((length, 2, *self._kv), generator=generator)
        return values.to(device=self._comm.device, dtype=DTYPES[self._case.dtype])


def _meet(comm: Communicator) -> None:
    """All ranks begin together."""
    comm.all_gather(torch.zeros(1, device=comm.device), _BARRIER).wait()
    _finish(comm)


def _finish(comm: Communicator) -> None:
    """What was waited for has happened on the device, too."""
    comm.verify()
    if comm.device.type == "cuda":
        torch.cuda.synchronize(comm.device)
