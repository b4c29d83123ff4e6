"""Requests on several ranks: what fails on one rank is told to all, and nobody is left waiting."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from apb.comm import Communicator
from apb.config import compose_config
from apb.errors import InputError
from apb.hf.byte_tokenizer import byte_tokenizer
from apb.hf.model import CausalLM
from apb.launchers.torchrun import TorchrunSession
from apb.runner import RequestRunner
from models import hf_model
from rank_pool import RankPool

PoolOf = Callable[[int], RankPool]
PARAMS = {"max_tokens": 3, "ignore_eos": True}
OVERRIDES = ["model=tiny", "device=cpu", "method.min_block_len=16"]


def ask(runner: RequestRunner, document: str) -> list[int] | str:
    arguments: dict[str, Any] = {"document": document, "question": "Who?", "params": PARAMS}
    try:
        *_, last = runner.handle("ask", arguments)
    except InputError as error:
        return str(error)
    ids: list[int] = last["result"]["token_ids"]
    return ids


def fail_to_load_on_rank_1(comm: Communicator, document: str) -> list[list[int] | str]:
    """One request whose weights rank 1 cannot read, and the same request again."""

    def load(*_: Any, **__: Any) -> None:
        raise InputError("the disk is gone")

    runner = RequestRunner(compose_config(OVERRIDES), comm)
    if comm.rank == 1:
        with patch.object(CausalLM, "load", load):
            first = ask(runner, document)
    else:
        first = ask(runner, document)
    return [first, ask(runner, document)]


def ask_differently(comm: Communicator, documents: list[str]) -> list[list[int] | str]:
    """A request that differs between the ranks, and one that does not."""
    runner = RequestRunner(compose_config(OVERRIDES), comm)
    return [ask(runner, documents[comm.rank]), ask(runner, documents[0])]


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_cannot_load_is_named_on_all_and_may_try_again(
    pool_of: PoolOf, world_size: int
) -> None:
    outcomes = pool_of(world_size).run(fail_to_load_on_rank_1, "The miller kept bees. " * 9)
    answers = [again for _, again in outcomes]
    assert answers == [answers[0]] * world_size
    assert len(answers[0]) == 3
    for rank, (failure, _) in enumerate(outcomes):
        assert failure == ("the disk is gone" if rank == 1 else "rank 1: the disk is gone")


def test_ranks_that_were_asked_different_things_refuse(pool_of: PoolOf) -> None:
    documents = ["The miller kept bees. " * 9, "The miller kept goats. " * 9]
    for rank, (refusal, answer) in enumerate(pool_of(2).run(ask_differently, documents)):
        assert refusal == f"rank {1 - rank} was given another request than this rank"
        assert len(answer) == 3


def start_without_the_model_on_rank_1(comm: Communicator, folder: str) -> str | None:
    """Under torchrun, on machines of which the second has not got the model."""
    model = folder if comm.rank == 0 else f"{folder}-missing"
    overrides = ["launcher=torchrun", "device=cpu", "model=custom", f"model.path={model}"]
    environment = {"RANK": str(comm.rank), "WORLD_SIZE": str(comm.world_size)}
    with patch.dict("os.environ", environment):
        try:
            TorchrunSession(compose_config(overrides))
        except InputError as error:
            return str(error)
    return None


def test_what_one_torchrun_rank_alone_lacks_is_told_to_all(pool_of: PoolOf, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    hf_model("llama").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    reasons = pool_of(2).run(start_without_the_model_on_rank_1, str(folder))
    assert "model-missing" in (reasons[1] or "")
    assert reasons[0] == f"rank 1: {reasons[1]}"


def fail_on_the_owner_that_decodes_alone(comm: Communicator) -> str:
    """What each rank ends with when rank 0 cannot choose the first token."""

    def choose(*_: Any) -> None:
        raise RuntimeError("an index out of range")

    runner = RequestRunner(compose_config([*OVERRIDES, "decode.placement=rank0"]), comm)
    try:
        with patch.object(CausalLM, "logits", choose) if comm.rank == 0 else nullcontext():
            ask(runner, "The miller kept bees. " * 9)
    except Exception as error:
        if comm.rank == 0:
            dist.destroy_process_group()  # as the end of its process would
        return type(error).__name__
    return "an answer"


def test_an_owner_that_fails_alone_is_no_orderly_end_to_the_others() -> None:
    with closing(RankPool(3)) as pool:
        ends = pool.run(fail_on_the_owner_that_decodes_alone)
    assert ends == ["RuntimeError", "PeerLostError", "PeerLostError"]


@pytest.mark.parametrize(
    ("rank", "local_rank", "is_told"),
    [(0, 0, False), (1, 1, False), (2, 0, True), (3, 1, False)],
)
def test_what_another_machine_lacks_is_told_there_once(
    rank: int,
    local_rank: int,
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rank 0 tells what it lacks itself, as all bad input."""
    variables = {"RANK": rank, "WORLD_SIZE": 2000, "LOCAL_RANK": local_rank}
    for name, value in {**variables, "LOCAL_WORLD_SIZE": 1000}.items():
        monkeypatch.setenv(name, str(value))
    config = compose_config(["model=tiny", "launcher=torchrun", "device=cuda"])
    with pytest.raises(InputError) as raised:
        TorchrunSession(config)
    assert capsys.readouterr().err == (f"apb: rank {rank}: {raised.value}\n" if is_told else "")
