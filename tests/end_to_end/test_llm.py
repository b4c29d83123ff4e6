"""`LLM` on ranks in processes: the same answers as one rank, streams, failures and clean-up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import save_file

from apb import LLM, EngineDeadError, InputError, RequestError, SamplingParams
from apb.hf.byte_tokenizer import byte_tokenizer
from apb.output import RequestOutput
from apb.prompts.template import build_prompt
from retaining_heads import published, random_heads, tiny_shape

DOCUMENT = "The mill stood by the river, and the miller kept bees. " * 40
QUESTION = "Who kept bees?"
PARAMS = SamplingParams(max_tokens=12, ignore_eos=True)
tiny = partial(LLM, "tiny", dtype="float32")
EXACT = ["method.passing_len=1.0", "method.min_block_len=1"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with tiny(world_size=2, overrides=["method.min_block_len=64"]) as ranks:
        yield ranks


def test_full_gives_the_same_tokens_on_any_number_of_ranks() -> None:
    tokens = []
    for world_size in (1, 3):
        with tiny(world_size=world_size, method="full") as ranks:
            tokens.append(ranks.ask(DOCUMENT, QUESTION, PARAMS).token_ids)
    assert tokens[0] == tokens[1]
    assert len(tokens[0]) == 12


def test_logprobs_with_every_token_passed_equal_full() -> None:
    continuation = "The miller."
    with tiny(world_size=2, overrides=EXACT) as ranks:
        passed = ranks.logprobs(DOCUMENT, continuation)
    with tiny(world_size=1, method="full") as ranks:
        exact = ranks.logprobs(DOCUMENT, continuation)
    assert len(exact) == len(continuation)
    assert passed == pytest.approx(exact, abs=1e-4)


def test_a_document_of_one_token_is_scored_from_it_on(llm: LLM) -> None:
    ids = list(DOCUMENT.encode())[:9]
    whole = llm.logprobs(ids[:1], ids[1:])
    assert whole[2:] == pytest.approx(llm.logprobs(ids[:3], ids[3:]), abs=1e-4)
    with tiny(world_size=1, method="full") as ranks:
        assert whole == pytest.approx(ranks.logprobs(ids[:1], ids[1:]), abs=1e-4)


def test_likelihoods_know_what_greedy_decoding_takes() -> None:
    first = SamplingParams(max_tokens=1, ignore_eos=True)
    known = []
    with tiny(world_size=1, method="full", overrides=["model.template=raw"]) as ranks:
        for end in range(300, 308):
            document = list(DOCUMENT.encode())[:end]
            [best] = ranks.ask(document[:-1], document[-1:], first).token_ids
            if best < 256:  # the model has more ids than its tokenizer
                known.append(best)
                assert ranks.likelihood(document, [best]).is_best == [True]
                assert ranks.likelihood(document, [255 - best]).is_best == [False]
    assert known


def test_a_divergence_stands_beside_exact_attention() -> None:
    document, continuation = DOCUMENT, "The miller."
    # Larger weights, by which attention matters more than rounding.
    settings = ["+model.architecture.initializer_range=0.1", "dtype=float32"]
    with LLM("tiny", world_size=2, overrides=["method.min_block_len=64", *settings]) as ranks:
        found = ranks.divergence(document, continuation)
        assert found.logprobs == pytest.approx(ranks.logprobs(document, continuation), abs=1e-5)
    with LLM("tiny", world_size=1, method="full", overrides=settings) as ranks:
        assert found.exact == pytest.approx(ranks.logprobs(document, continuation), abs=1e-4)
        rounding = max(map(abs, ranks.divergence(document, continuation).kl))
    assert rounding < 1e-5
    assert max(found.kl) > 100 * rounding


def test_other_settings_take_effect_without_new_ranks(llm: LLM) -> None:
    before = llm.logprobs(DOCUMENT, "The miller.")
    settings = ["model=tiny", "world_size=2", "dtype=float32"]
    with LLM.from_overrides([*settings, "method=full"]) as ranks:
        exact = ranks.logprobs(DOCUMENT, "The miller.")
        ranks.configure([*settings, "method=apb", "method.min_block_len=64"])
        assert ranks.logprobs(DOCUMENT, "The miller.") == before
        assert ranks.ask(DOCUMENT, QUESTION, PARAMS).metrics.method == "apb"
        for wrong, words in ((["dtype=bfloat16"], "dtype cannot"), (["num_blocks=x"], "num_block")):
            with pytest.raises(InputError, match=words):
                ranks.configure([*settings, *wrong])
        assert ranks.config.dtype == "float32"
        ranks.configure([*settings, "method=full", "drafter=none"])
        assert ranks.logprobs(DOCUMENT, "The miller.") == exact
        assert ranks.ask(DOCUMENT, QUESTION, PARAMS).metrics.drafter == "none"


def test_an_answer_goes_on_from_its_start() -> None:
    prompt = build_prompt(byte_tokenizer(), DOCUMENT, QUESTION, answer_start="The miller")
    with tiny(world_size=1, method="full") as ranks:
        begun = ranks.ask(DOCUMENT, QUESTION, PARAMS, answer_start="The miller").token_ids
        assert begun != ranks.ask(DOCUMENT, QUESTION, PARAMS).token_ids
    with tiny(world_size=1, method="full", overrides=["model.template=raw"]) as ranks:
        assert ranks.ask(prompt.context_ids, prompt.query_ids, PARAMS).token_ids == begun


def test_trained_heads_select_alike_on_any_number_of_ranks(tmp_path: Path) -> None:
    heads = random_heads(tiny_shape(), hidden_size=24)
    save_file(published(heads), tmp_path / "model.safetensors")
    trained = ["method/compressor=retaining_head", f"method.compressor.heads={tmp_path}"]
    cases = {
        "heads": (2, trained),
        "heads on one rank": (1, trained),
        "other": (1, ["method/compressor=random"]),
    }
    common = ["method.layout=even", "method.min_block_len=64", "num_blocks=4"]
    logprobs = {}
    for name, (world_size, compressor) in cases.items():
        with tiny(world_size=world_size, overrides=[*compressor, *common]) as ranks:
            logprobs[name] = ranks.logprobs(DOCUMENT, "The miller.", query=QUESTION)
    assert logprobs["heads"] == pytest.approx(logprobs["heads on one rank"], abs=1e-5)
    assert logprobs["heads"] != pytest.approx(logprobs["other"], abs=1e-5)


def test_pieces_of_a_stream_make_up_the_answer(llm: LLM) -> None:
    whole: list[RequestOutput] = []

    def stream() -> Iterator[str]:
        whole.append((yield from llm.stream(DOCUMENT, QUESTION, PARAMS)))

    text = "".join(stream())
    asked = llm.ask(DOCUMENT, QUESTION, PARAMS)
    assert text == asked.text
    [streamed] = whole
    assert (streamed.text, streamed.token_ids) == (asked.text, asked.token_ids)
    assert streamed.finish_reason == asked.finish_reason


def test_decoding_without_params_follows_the_settings() -> None:
    settings: dict[str, Any] = {"max_tokens": 6, "temperature": 1.0, "ignore_eos": True}
    overrides = [f"decode.{name}={str(value).lower()}" for name, value in settings.items()]
    with tiny(world_size=1, overrides=["seed=3", *overrides]) as ranks:
        found = ranks.ask(DOCUMENT, QUESTION).token_ids
        assert found == ranks.ask(DOCUMENT, QUESTION, SamplingParams(**settings, seed=3)).token_ids
        other = ranks.ask(DOCUMENT, QUESTION, SamplingParams(**settings, seed=4)).token_ids
    assert len(found) == 6
    assert found != other


def test_a_model_may_be_given_as_a_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=tmp_path.name):
        LLM(tmp_path, world_size=1)


def test_a_closed_stream_leaves_the_ranks_ready(llm: LLM) -> None:
    expected = llm.ask(DOCUMENT, QUESTION, PARAMS).token_ids
    stream = llm.stream(DOCUMENT, QUESTION, SamplingParams(max_tokens=2000, ignore_eos=True))
    next(iter(stream))
    with pytest.raises(RequestError, match="stream of this thread"):
        llm.ask(DOCUMENT, QUESTION, PARAMS)
    stream.close()
    assert llm.ask(DOCUMENT, QUESTION, PARAMS).token_ids == expected


def test_threads_take_turns(llm: LLM) -> None:
    expected = llm.ask(DOCUMENT, QUESTION, PARAMS).token_ids
    seen: list[list[int]] = []
    threads = [
        threading.Thread(target=lambda: seen.append(llm.ask(DOCUMENT, QUESTION, PARAMS).token_ids))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [expected] * 3


def test_two_gangs_on_one_machine_do_not_meet(llm: LLM) -> None:
    with tiny(world_size=2, overrides=["model.weights_seed=1"]) as other:
        theirs = other.ask(DOCUMENT, QUESTION, PARAMS).token_ids
        ours = llm.ask(DOCUMENT, QUESTION, PARAMS).token_ids
        assert other.ask(DOCUMENT, QUESTION, PARAMS).token_ids == theirs
    assert ours != theirs
    assert llm.ask(DOCUMENT, QUESTION, PARAMS).token_ids == ours


def test_a_bad_request_is_refused_and_the_next_one_answered(llm: LLM) -> None:
    for document, question, words in (
        ("", QUESTION, "document is empty"),
        (DOCUMENT, "  ", "question is empty"),
        ([1, 2, 70000], QUESTION, "outside"),
        ("x" * 70_000, QUESTION, "reads at most 65536"),
    ):
        with pytest.raises(InputError, match=words):
            llm.ask(document, question, PARAMS)
    assert llm.ask(DOCUMENT, QUESTION, PARAMS).finish_reason == "length"


def test_metrics_account_for_every_token(llm: LLM) -> None:
    metrics = llm.ask(DOCUMENT, QUESTION, PARAMS).metrics
    assert sum(rank.tokens_cached for rank in metrics.layout) == metrics.context_tokens
    assert metrics.generated_tokens == 12
    assert 0 < metrics.prefill_s < metrics.ttft_s
    assert min(metrics.bytes_exchanged) > 0
    assert min(metrics.peak_memory_bytes) > 2**20


def test_stop_ids_and_strings_end_the_answer_also_at_the_first_token(llm: LLM) -> None:
    free = llm.ask(DOCUMENT, QUESTION, PARAMS)
    first = free.token_ids[0]
    stopped = llm.ask(
        DOCUMENT, QUESTION, SamplingParams(max_tokens=12, ignore_eos=True, stop_token_ids=(first,))
    )
    assert (stopped.token_ids, stopped.text, stopped.finish_reason) == ([first], "", "stop")
    text = free.text
    cut = llm.ask(
        DOCUMENT, QUESTION, SamplingParams(max_tokens=12, ignore_eos=True, stop=(text[0],))
    )
    assert (cut.text, cut.finish_reason) == ("", "stop")


def test_sampling_repeats_with_its_seed(llm: LLM) -> None:
    def sample(seed: int) -> list[int]:
        params = SamplingParams(max_tokens=16, temperature=1.5, seed=seed, ignore_eos=True)
        return llm.ask(DOCUMENT, QUESTION, params).token_ids

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def rank_process(ranks: LLM, rank: int) -> psutil.Process:
    session: Any = ranks._session
    processes = getattr(session, "_gang", session)._ranks
    return psutil.Process(processes._ranks[rank].process.pid)


def test_a_killed_rank_is_named_and_nothing_is_left_behind() -> None:
    ranks = tiny(world_size=3, on_failure="stop")
    children = [rank_process(ranks, rank) for rank in range(3)]
    children[1].send_signal(signal.SIGKILL)
    with pytest.raises(EngineDeadError, match=r"rank 1 .*SIGKILL"):
        ranks.ask(DOCUMENT, QUESTION, PARAMS)
    with pytest.raises(EngineDeadError, match="rank 1"):
        ranks.ask(DOCUMENT, QUESTION, PARAMS)
    assert not [child for child in children if child.is_running()]


def test_a_rank_that_dies_between_requests_costs_none(llm: LLM) -> None:
    expected = llm.ask(DOCUMENT, QUESTION, PARAMS).token_ids
    rank = rank_process(llm, 1)
    rank.kill()
    assert llm.ask(DOCUMENT, QUESTION, PARAMS).token_ids == expected
    assert not rank.is_running()


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "ask.py"
    script.write_text(
        "from apb import LLM, SamplingParams\n"
        "llm = LLM('tiny', world_size=2)\n"
        "print(len(llm.ask('a mill ' * 200, 'Where?', SamplingParams(max_tokens=3)).token_ids))\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert 1 <= int(done.stdout) <= 3


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dtype": "int4"}, "dtype=int4"),
        ({"method": "nope"}, "method=nope does not exist"),
        ({"launcher": "torchrun"}, "RANK and WORLD_SIZE"),
        ({"world_size": 2, "num_blocks": 0}, "num_blocks=0"),
        ({"on_failure": "hope"}, "on_failure=hope must be one of restart, stop"),
        ({"launcher": "torchrun", "on_rank_loss": "degrade"}, "torchrun starts all of them again"),
        ({"request_timeout_s": 0.0}, "request_timeout_s=0.0 must be a positive number"),
    ],
)
def test_wrong_settings_fail_at_once(settings: dict[str, str | float], words: str) -> None:
    assert "RANK" not in os.environ
    with pytest.raises(InputError, match=words):
        LLM("tiny", **settings)  # type: ignore[arg-type]
