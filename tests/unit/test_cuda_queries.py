"""What is made of CUDA's answers, where there is no GPU to ask."""

from __future__ import annotations

import pytest
import torch

from apb.comm import Communicator
from apb.heartbeat import Beat, Pulse
from apb.metrics import free_memory

CUDA = torch.device("cuda")


def test_what_the_allocator_keeps_of_an_earlier_request_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers = {"mem_get_info": (10, 100), "memory_reserved": 60, "memory_allocated": 25}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, answer=answer: answer)
    assert free_memory(CUDA) == 10 + 60 - 25


def test_who_ends_a_prefill_waits_like_the_others_though_nothing_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pulse, seen = Pulse(), list[Beat]()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: seen.append(pulse.beat))
    Communicator(0, 2, CUDA, defer_checks=True, pulse=pulse).settle(7, 30)
    [while_waiting] = seen
    assert while_waiting.waiting
    assert (while_waiting.step, while_waiting.layer) == (7, 30)
    assert not pulse.beat.waiting
