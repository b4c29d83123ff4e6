"""Faults on demand, for tests: ``APB_FAULTS="rank=2,stage=prefill,layer=3,kind=kill"``.

Several are separated by semicolons. Off unless the variable is set, and each happens once.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apb.comm import HEADER_BYTES, Communicator, Kind, Pending, Tag
from apb.errors import InputError

_LOG = logging.getLogger(__name__)
VARIABLE = "APB_FAULTS"
STAGES = ("start", "load", "prefill", "exchange", "decode")
KINDS = ("kill", "exit0", "raise", "hang", "stop", "slow", "nan", "corrupt", "skip", "oom")
_OF_MESSAGES = ("nan", "corrupt", "skip")
"""Kinds that spoil what a rank sends during a prefill, and so need ``stage=exchange``."""

_WITH_KV = (Kind.UPSTREAM, Kind.RING, Kind.HEADS, Kind.SHARD)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        rank: which has it.
        stage: one of `STAGES`.
        kind: one of `KINDS`.
        layer: or decoded token; None is the first that comes along.
        request: counted from 1 within a gang, where loading is one too; None is any.
        gang: restarts before the gang that has it.
        seconds: of `hang` and `slow`, which slows every layer from there on.
    """

    rank: int
    stage: str
    kind: str
    layer: int | None = None
    request: int | None = None
    gang: int = 0
    seconds: float = 3600.0

    @classmethod
    def parse(cls, text: str) -> Fault:
        pairs = [setting.partition("=") for setting in text.split(",")]
        given: dict[str, Any] = {name.strip(): value.strip() for name, _, value in pairs}
        try:
            for name in ("rank", "layer", "request", "gang", "seconds"):
                if name in given:
                    given[name] = (float if name == "seconds" else int)(given[name])
            fault = cls(**given)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{VARIABLE} has {text!r}: write rank=N,stage=STAGE,kind=KIND and, where wanted, "
                "layer=, request=, gang= and seconds="
            ) from error
        for name, value, choices in (
            ("stage", fault.stage, ("exchange",) if fault.kind in _OF_MESSAGES else STAGES),
            ("kind", fault.kind, KINDS),
        ):
            if value not in choices:
                raise InputError(f"{VARIABLE} has {name}={value}: choose {', '.join(choices)}")
        return fault

    def applies(self, stage: str, layer: int, request: int) -> bool:
        return (
            stage == self.stage and self.layer in (None, layer) and self.request in (None, request)
        )


def planned_faults(environment: Mapping[str, str], *, rank: int, gang: int) -> list[Fault]:
    """What the environment wants of a rank in a gang that was restarted `gang` times.

    Raises:
        InputError: the text is not understood.
    """
    text = environment.get(VARIABLE, "").strip()
    faults = [Fault.parse(part) for part in text.split(";") if part.strip()]
    return [fault for fault in faults if (fault.rank, fault.gang) == (rank, gang)]


@dataclass(slots=True)
class FaultInjector:
    """Lets faults happen as a rank reaches their places."""

    faults: list[Fault]
    armed: str | None = None
    """The kind of fault that the next message has."""
    _delay_s: float = 0.0

    def reach(self, stage: str, layer: int, request: int) -> None:
        """As `Pulse.on_mark`."""
        time.sleep(self._delay_s)
        for fault in [fault for fault in self.faults if fault.applies(stage, layer, request)]:
            self.faults.remove(fault)
            _LOG.warning("%s: %s in %s, layer or token %d", VARIABLE, fault.kind, stage, layer)
            self._happen(fault)

    def _happen(self, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "exit0":
                os._exit(0)
            case "raise":
                raise RuntimeError(f"injected by {VARIABLE}")
            case "oom":
                raise torch.OutOfMemoryError(f"injected by {VARIABLE}")
            case "hang":
                time.sleep(fault.seconds)
            case "slow":
                self._delay_s = fault.seconds
            case kind:
                self.armed = kind


@dataclass(slots=True)
class FaultyCommunicator(Communicator):
    """Spoils the next message once the injector is armed."""

    injector: FaultInjector = field(default_factory=lambda: FaultInjector([]))

    def all_gather(self, x: Tensor, tag: Tag) -> Pending[Tensor]:
        if self._disarm("skip"):
            return Pending(lambda: torch.stack([x] * self.world_size))
        return Communicator.all_gather(self, x, tag)

    def exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor], tag: Tag
    ) -> Pending[dict[int, Tensor]]:
        if self._disarm("skip"):
            empty = {rank: torch.zeros_like(x, device=self.device) for rank, x in incoming.items()}
            return Pending(lambda: empty)
        return Communicator.exchange(self, outgoing, incoming, tag)

    def _pack(self, x: Tensor, tag: Tag, *, payload: bool = True) -> Tensor:
        buffer_U = Communicator._pack(self, x, tag, payload=payload)
        if payload and self._disarm("corrupt"):
            buffer_U[0] ^= 0xFF
        elif payload and tag.kind in _WITH_KV and self._disarm("nan"):
            buffer_U[HEADER_BYTES:] = 0xFF  # NaN in every float format
        return buffer_U

    def _disarm(self, kind: str) -> bool:
        if self.injector.armed != kind:
            return False
        self.injector.armed = None
        return True
