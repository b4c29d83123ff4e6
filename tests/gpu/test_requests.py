"""Whole requests on GPUs give what they give on the CPU, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from apb import LLM, SamplingParams
from apb.output import RequestOutput

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpus")]
on_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

DOCUMENT = "The mill stood by the river, and the miller kept bees. " * 20
QUESTION = "Who kept bees?"
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
# Larger weights, by which attention matters more than rounding.
SETTINGS = ["+model.architecture.initializer_range=0.1", "dtype=float32"]
BLOCKS = ["num_blocks=4", "method.min_block_len=32"]
METHODS = {
    "full": ["method=full"],
    "star": ["method=star", *BLOCKS],
    "apb": ["method=apb", *BLOCKS],
}
OVER_RANKS = METHODS | {name: [f"method={name}"] for name in ("ring", "zigzag", "ulysses")}


def assert_as_on_the_cpu(settings: Sequence[str], *, world_size: int) -> None:
    answers: dict[str, RequestOutput] = {}
    for device in ("cpu", "cuda"):
        overrides = [*SETTINGS, *settings]
        with LLM("tiny", device=device, world_size=world_size, overrides=overrides) as llm:
            answers[device] = llm.ask(DOCUMENT, QUESTION, PARAMS)
    assert answers["cuda"].token_ids == answers["cpu"].token_ids
    assert answers["cuda"].metrics.device == torch.cuda.get_device_name()


@pytest.mark.parametrize("drafter", ["none", "hybrid"])
@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_gpu_answers_as_the_cpu_does(settings: list[str], drafter: str) -> None:
    assert_as_on_the_cpu([*settings, f"drafter={drafter}"], world_size=1)


def test_the_same_request_again_finds_the_memory_that_the_first_one_left() -> None:
    overrides = [*SETTINGS, "decode.placement=rank0"]
    with LLM("tiny", device="cuda", world_size=1, overrides=overrides) as llm:
        first, second = (llm.ask(DOCUMENT, QUESTION, PARAMS) for _ in range(2))
    assert second.token_ids == first.token_ids
    assert second.metrics.placement == first.metrics.placement


@on_two_gpus
@pytest.mark.parametrize("placement", ["sharded", "rank0"])
@pytest.mark.parametrize("settings", OVER_RANKS.values(), ids=OVER_RANKS)
def test_ranks_over_nccl_answer_as_over_gloo(settings: list[str], placement: str) -> None:
    assert_as_on_the_cpu([*settings, f"decode.placement={placement}"], world_size=2)


@on_two_gpus
def test_a_divergence_over_nccl_is_that_over_gloo() -> None:
    found = {}
    for device in ("cpu", "cuda"):
        overrides = [*SETTINGS, *METHODS["apb"]]
        with LLM("tiny", device=device, world_size=2, overrides=overrides) as llm:
            found[device] = llm.divergence(DOCUMENT, "The miller.")
    assert found["cuda"].logprobs == pytest.approx(found["cpu"].logprobs, abs=1e-4)
    assert found["cuda"].kl == pytest.approx(found["cpu"].kl, abs=1e-4)
