"""What ranks have to agree on before they run a request together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

from apb.comm import Communicator, Kind, Tag
from apb.errors import InputError
from apb.methods.decode import OWNER

T = TypeVar("T")


def together(comm: Communicator, request: object, prepare: Callable[[], T]) -> T:
    """`prepare` on every rank; all ranks raise unless all succeed, and on the same request.

    What can fail on one rank alone, such as reading weights, belongs in `prepare`: a rank that
    failed later would leave the others waiting for it.

    Raises:
        InputError: a rank could not prepare, or was given another request.
    """
    result, cause = None, None
    try:
        result = prepare()
    except InputError as error:
        cause = str(error)
    digest = hashlib.sha256(json.dumps(request).encode()).hexdigest()
    tag = Tag(0, 0, Kind.REPORT)
    for rank, (theirs, failure) in enumerate(comm.all_gather_json([digest, cause], tag)):
        if failure is not None:
            raise InputError(failure if cause == failure else f"rank {rank}: {failure}")
        if theirs != digest:
            raise InputError(f"rank {rank} was given another request than this rank")
    return cast(T, result)


def from_owner(comm: Communicator, value: Any) -> Any:
    """The owner's JSON value, which may be long, on every rank."""
    if comm.world_size == 1:
        return value
    tag = Tag(0, 0, Kind.REPORT)
    text = json.dumps(value).encode() if comm.rank == OWNER else b""
    (size,) = comm.broadcast_ints([len(text)], tag, src=OWNER)
    text_U = torch.frombuffer(bytearray(text or bytes(size)), dtype=torch.uint8).to(comm.device)
    received_U = comm.broadcast(text_U, tag, src=OWNER).wait()
    comm.verify()
    return json.loads(received_U.cpu().numpy().tobytes())
