"""The measurements of `benchmarks.prefill`, each in processes of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

from apb import LLM, SamplingParams
from apb.config import compose_config
from apb.errors import ApbError
from apb.hf.tokenizer import load_tokenizer
from apb.metrics import usable_cores
from apb.prompts.template import build_prompt
from benchmarks.environment import ROOT
from benchmarks.memory import RankMemory, Sizes, settled_children
from benchmarks.prefill_hf import HfJob, HfResult

_GATE_DOCUMENT, _GATE_CONTINUATION = 512, 32
_WARM_UP_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the things compared; `overrides` are apb's, none for the Hugging Face model."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    ranks: int = 1
    threads: int = 1
    """Per rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One measurement. Hugging Face's prefill includes the question, apb's does not."""

    variant: str
    length: int
    repeat: int
    load_s: float
    """From starting the processes to being ready for a prompt."""
    prefill_s: float
    first_token_s: float
    memory: list[RankMemory]

    def line(self) -> str:
        return (
            f"{self.variant:>8} {self.length:>6} #{self.repeat}  load {self.load_s:.1f} s  prefill "
            f"{self.prefill_s:.2f} s  first token {self.first_token_s:.2f} s  peak "
            f"{' '.join(f'{rank.peak / 2**20:.0f}' for rank in self.memory)} MiB"
        )


class Bench:
    """Runs any variant on a prompt of token ids."""

    def __init__(self, model: str, overrides: Sequence[str], sizes: Sizes) -> None:
        self._name, self._overrides, self._sizes = model, list(overrides), sizes
        self._model = compose_config([f"model={model}", *overrides]).model
        self._tokenizer = load_tokenizer(self._model)
        self._weights: int | None = None
        self._baselines = cache(self._measure_baselines)

    def run(
        self, variant: Variant, document: list[int], question: list[int], *, repeat: int
    ) -> Run:
        """One measurement; a Hugging Face variant has to run first, as it counts the weights."""
        measure = self._run_apb if variant.overrides else self._run_hf
        return measure(variant, document, question, repeat)

    def _run_hf(
        self, variant: Variant, document: list[int], question: list[int], repeat: int
    ) -> Run:
        prompt = build_prompt(
            self._tokenizer,
            document,
            question,
            **self._model.prompt_settings,
        )
        job = HfJob(
            overrides=[f"model={self._name}", *self._overrides],
            token_ids=[*prompt.context_ids, *prompt.query_ids],
            threads=variant.threads,
            wide=variant.name == "hf-wide",
        )
        result = HfResult(**_hf(job))
        self._weights = result.weight_bytes
        num_tokens = len(job.token_ids)
        memory = RankMemory(
            peak=result.peak_bytes,
            baseline=result.baseline_bytes,
            weights=result.weight_bytes,
            kv=num_tokens * self._sizes.kv,
            activations=num_tokens * self._sizes.activations,
        )
        return Run(
            variant=variant.name,
            length=len(document),
            repeat=repeat,
            load_s=result.load_s,
            prefill_s=result.prefill_s,
            first_token_s=result.prefill_s,
            memory=[memory],
        )

    def _run_apb(
        self, variant: Variant, document: list[int], question: list[int], repeat: int
    ) -> Run:
        assert self._weights is not None, "no Hugging Face variant has run"
        baselines = self._baselines(variant)
        overrides = [*self._overrides, *variant.overrides]
        params = SamplingParams(max_tokens=1)
        begin = time.perf_counter()
        with (
            _threads(variant.threads),
            LLM(self._name, launcher="local", world_size=variant.ranks, overrides=overrides) as llm,
        ):
            load_s = time.perf_counter() - begin
            llm.ask(document[:_WARM_UP_TOKENS], question, params)
            metrics = llm.ask(document, question, params).metrics
        memory = [
            RankMemory(
                peak=peak,
                baseline=baseline,
                weights=self._weights,
                kv=layout.tokens_cached * self._sizes.kv,
                activations=layout.tokens_run * self._sizes.activations,
            )
            for peak, baseline, layout in zip(
                metrics.peak_memory_bytes, baselines, metrics.layout, strict=True
            )
        ]
        return Run(
            variant=variant.name,
            length=len(document),
            repeat=repeat,
            load_s=load_s,
            prefill_s=metrics.prefill_s,
            first_token_s=metrics.ttft_s,
            memory=memory,
        )

    def _measure_baselines(self, variant: Variant) -> list[int]:
        """Every rank's resident set before it reads weights, which `make_needle` does without."""
        overrides = [
            f"model={self._name}",
            "launcher=local",
            f"world_size={variant.ranks}",
            *self._overrides,
            *variant.overrides,
        ]
        with _threads(variant.threads), LLM.from_overrides(overrides) as llm:
            llm.make_needle(context_len=_WARM_UP_TOKENS)
            return settled_children(variant.ranks)


def gate(model: str, overrides: Sequence[str], *, vocab_size: int) -> float:
    """Largest difference in log-probability between method=full and the Hugging Face model."""
    rng = random.Random(0)
    document = rng.choices(range(vocab_size), k=_GATE_DOCUMENT)
    continuation = rng.choices(range(vocab_size), k=_GATE_CONTINUATION)
    threads = usable_cores()
    job = HfJob(
        overrides=[f"model={model}", *overrides],
        token_ids=document + continuation,
        threads=threads,
        targets=len(continuation),
    )
    expected: list[float] = _hf(job)
    with (
        _threads(threads),
        LLM(model, launcher="local", world_size=1, method="full", overrides=overrides) as llm,
    ):
        values = llm.logprobs(document, continuation)
    return max(abs(ours - theirs) for ours, theirs in zip(values, expected, strict=True))


def _hf(job: HfJob) -> Any:
    """The result of a job in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.prefill_hf"],
        input=json.dumps(asdict(replace(job, started=time.time()))),
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(job.threads)},
        text=True,
    )
    if done.returncode:
        raise ApbError(f"the Hugging Face process ended with exit code {done.returncode}")
    return json.loads(done.stdout)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Ranks started within use `count` threads each."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        os.environ.pop("OMP_NUM_THREADS")
        if before is not None:
            os.environ["OMP_NUM_THREADS"] = before
