"""Faults on demand: what the variable means, whom it hits and when, and what it refuses."""

from __future__ import annotations

import pytest
import torch

from apb.errors import InputError
from apb.faults import KINDS, STAGES, Fault, FaultInjector, planned_faults

TEXT = (
    "rank=2,stage=prefill,layer=3,kind=kill; rank=1, stage=decode, kind=slow, seconds=0.2, gang=1"
)


def test_a_rank_gets_its_own_faults_of_its_gang() -> None:
    environment = {"APB_FAULTS": TEXT}
    kill = Fault(rank=2, stage="prefill", layer=3, kind="kill")
    slow = Fault(rank=1, stage="decode", kind="slow", seconds=0.2, gang=1)
    assert planned_faults(environment, rank=2, gang=0) == [kill]
    assert planned_faults(environment, rank=1, gang=1) == [slow]
    assert planned_faults(environment, rank=1, gang=0) == []
    assert planned_faults({}, rank=2, gang=0) == planned_faults({"APB_FAULTS": " "}, rank=0, gang=0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rank=2", "write rank=N,stage=STAGE,kind=KIND"),
        ("rank=two,stage=load,kind=kill", "'rank=two,stage=load,kind=kill'"),
        ("rank=2,stage=load,kind=kill,when=now", "write rank=N"),
        ("rank=2,stage=sleep,kind=kill", "stage=sleep: choose start, load"),
        ("rank=2,stage=load,kind=melt", "kind=melt: choose kill, exit0"),
        ("rank=2,stage=prefill,kind=nan", "stage=prefill: choose exchange"),
        ("kill", "'kill'"),
    ],
)
def test_what_is_not_understood_is_refused_in_a_sentence(text: str, words: str) -> None:
    with pytest.raises(InputError, match=r"^APB_FAULTS has ") as refusal:
        planned_faults({"APB_FAULTS": text}, rank=2, gang=0)
    assert words in str(refusal.value)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_asked_for(kind: str) -> None:
    assert Fault.parse(f"rank=0,stage=exchange,kind={kind}").stage in STAGES


def test_a_fault_happens_at_its_place_and_once() -> None:
    injector = FaultInjector([Fault.parse("rank=0,stage=prefill,layer=1,request=2,kind=oom")])
    for stage, layer, request in (("prefill", 1, 1), ("prefill", 0, 2), ("decode", 1, 2)):
        injector.reach(stage, layer, request)
    with pytest.raises(torch.OutOfMemoryError, match="injected by APB_FAULTS"):
        injector.reach("prefill", 1, 2)
    injector.reach("prefill", 1, 2)
