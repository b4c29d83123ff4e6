"""What stands before every message, and how a receiver tells that it is another one."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

from apb.errors import EngineDeadError, RankFailure

HEADER_BYTES = 128
_HEADER = struct.Struct("=16q")
_MAGIC = 0x41504231
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


class Kind(IntEnum):
    """What a message carries."""

    CONTROL = 1
    QUESTION = 2
    UPSTREAM = 3
    PARTIAL = 4
    REPORT = 5
    RING = 6
    HEADS = 7
    ROWS = 8
    SHARD = 9
    AUDIT = 10


class Tag(NamedTuple):
    """Which message this is: the forward pass, the layer within it, and the content."""

    step: int
    layer: int
    kind: Kind


def header_fields(tag: Tag, source: int, x: Tensor) -> tuple[int, ...]:
    """The header of a message: 16 integers, the last ones the shape and zeros."""
    fields = (_MAGIC, *tag, source, _DTYPES.index(x.dtype), x.dim(), *x.shape)
    return fields + (0,) * (HEADER_BYTES // 8 - len(fields))


def packed_header(tag: Tag, source: int, x: Tensor) -> Tensor:
    """A header as bytes ``[U]`` on the host."""
    return torch.frombuffer(
        bytearray(_HEADER.pack(*header_fields(tag, source, x))), dtype=torch.uint8
    )


def payload_of(buffer_RU: Tensor, like: Tensor) -> Tensor:
    flat_RN = buffer_RU[:, HEADER_BYTES:].view(like.dtype)[:, : like.numel()]
    return flat_RN.unflatten(1, like.shape) if like.dim() else flat_RN[:, 0]


def mismatch(rank: int, expected: Sequence[int], received: Sequence[int]) -> EngineDeadError:
    def describe(fields: Sequence[int]) -> str:
        magic, step, layer, kind, source, dtype, dim, *shape = fields
        if magic != _MAGIC:
            return "bytes that are no apb message"
        name = Kind(kind).name.lower() if kind in set(Kind) else f"kind {kind}"
        element = str(_DTYPES[dtype]).removeprefix("torch.")
        return f"{name} of step {step}, layer {layer}, rank {source}, {element} {shape[:dim]}"

    message = (
        f"rank {rank} waited for {describe(expected)} and received {describe(received)}: "
        "a rank skipped or repeated a collective"
    )
    # Who gets an older message than it waits for has itself left one out.
    is_behind = received[0] == _MAGIC and tuple(received[1:3]) < tuple(expected[1:3])
    suspect = rank if is_behind else expected[4]
    place = f"layer {expected[2]} of step {expected[1]}"
    failure = RankFailure(suspect, "", place, f"sent or missed the wrong message: {message}")
    return EngineDeadError(message, failure)
