"""Degraded answers: fewer ranks read the same blocks and answer the same, token for token."""

from __future__ import annotations

import pytest

from apb import LLM, EngineDeadError, RequestOutput
from faults.leftovers import Leftovers, left_since
from faults.scenarios import OVERRIDES, WORLD_SIZE
from faults.test_local import DOCUMENT, PARAMS, _forked, expected

__all__ = ["_forked", "expected"]  # fixtures

CASES = {
    "apb": (1, "prefill", ["method=apb"]),
    "zigzag-layout": (
        0,
        "exchange",
        ["method=apb", "method.layout=zigzag", "method.anchor=replicated"],
    ),
    "more-blocks": (
        2,
        "prefill",
        ["method=apb", "num_blocks=7", "method/compressor=query", "decode.placement=rank0"],
    ),
    "star": (2, "prefill", ["method=star"]),
    "zigzag": (1, "exchange", ["method=zigzag"]),
    "ulysses": (0, "prefill", ["method=ulysses"]),
    "full": (0, "prefill", ["method=full"]),
}
"""The lost rank, where it is lost, and what the ranks run."""


def open_llm(*settings: str) -> LLM:
    named = ["model=tiny", f"world_size={WORLD_SIZE}", "dtype=float32", "on_rank_loss=degrade"]
    others = [it for it in OVERRIDES if not it.startswith("method.")]
    llm = LLM.from_overrides([*named, *others, *settings])
    llm.make_needle(kind="single", context_len=600, depth=0.5, seed=0)
    return llm


def ask(llm: LLM) -> RequestOutput:
    return llm.ask(DOCUMENT, "Who kept bees?", PARAMS)


def blocks(output: RequestOutput) -> list[list[int]]:
    return sorted(block for rank in output.metrics.layout for block in rank.blocks)


@pytest.mark.usefixtures("expected")  # which has started the server that ranks fork from
@pytest.mark.parametrize(
    "case", [pytest.param(it, marks=[] if it == "apb" else pytest.mark.faults) for it in CASES]
)
def test_the_ranks_that_are_left_give_the_undisturbed_answer(
    case: str, monkeypatch: pytest.MonkeyPatch, before: Leftovers
) -> None:
    lost, stage, settings = CASES[case]
    monkeypatch.setenv("APB_FAULTS", f"rank={lost},stage={stage},layer=2,kind=kill,request=3")
    with open_llm(*settings) as llm:
        whole, degraded, later = ask(llm), ask(llm), ask(llm)
    for output in (degraded, later):
        assert output.token_ids == whole.token_ids
        assert blocks(output) == blocks(whole)
        assert len(output.metrics.layout) == WORLD_SIZE - 1
        *others, note = output.metrics.notes
        assert others == whole.metrics.notes
        assert note.startswith(f"rank {lost} on ")
        assert f"{WORLD_SIZE - 1} of {WORLD_SIZE} ranks read {len(blocks(whole))} block" in note
    assert left_since(before) == []


@pytest.mark.faults
def test_ranks_may_be_lost_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = [f"rank=1,stage=prefill,kind=raise,request={3 - gang},gang={gang}" for gang in (0, 1)]
    monkeypatch.setenv("APB_FAULTS", ";".join([*faults, "rank=0,stage=decode,kind=kill,gang=2"]))
    with open_llm() as llm:
        whole, degraded = ask(llm), None
        with pytest.raises(EngineDeadError, match=r"rank 0 on .* was killed"):
            degraded = ask(llm)  # the last rank is lost while it answers
        assert degraded is None
        assert whole.token_ids == ask(llm).token_ids
