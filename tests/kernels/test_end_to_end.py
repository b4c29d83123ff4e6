"""Whole requests through the kernels."""

from __future__ import annotations

from typing import Any

import pytest

from apb import LLM, InputError, SamplingParams

DOCUMENT = "The mill stood by the river, and the miller kept bees. " * 6
PARAMS = SamplingParams(max_tokens=5, ignore_eos=True)
SETTINGS = [
    *("method/compressor=query", "method.min_block_len=32", "num_blocks=4"),
    *("drafter=hybrid", "drafter.max_nodes=6", "decode.placement=sharded"),
]


@pytest.mark.interpreted
def test_fused_gives_the_tokens_of_the_specification() -> None:
    answers = {}
    for backend in ("reference", "fused"):
        with LLM("tiny", world_size=2, backend=backend, dtype="float32", overrides=SETTINGS) as llm:
            answers[backend] = llm.ask(DOCUMENT, "Who kept bees?", PARAMS)
        assert answers[backend].metrics.backend == backend
    assert answers["fused"].token_ids == answers["reference"].token_ids


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"backend": "flash"}, "backend=flash needs a GPU; on a CPU use backend=sdpa"),
        ({"backend": "fused"}, "backend=fused needs a GPU; on a CPU use backend=sdpa"),
    ],
)
def test_a_backend_that_cannot_run_is_refused_before_loading(
    settings: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match=words), LLM("tiny", device="cpu", **settings):
        pass


@pytest.mark.interpreted
def test_auto_on_a_cpu_is_sdpa_and_says_so() -> None:
    with LLM("tiny", world_size=1) as llm:
        assert llm.ask(DOCUMENT, "Who?", PARAMS).metrics.backend == "sdpa"
