"""The Hugging Face model on its own, in a process of its own: the baseline of `benchmarks.prefill`.

Reads one job as JSON from stdin and writes one JSON value to stdout.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from apb.config import compose_config
from apb.hf.checkpoint import Checkpoint
from apb.hf.linear import WideLinears
from apb.hf.model import DTYPES
from apb.metrics import PeakMemory
from benchmarks.memory import resident_bytes

_WARM_UP_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class HfJob:
    """What to run: a prefill of `token_ids`, or with `targets` the scores of their last rows."""

    overrides: list[str]
    token_ids: list[int]
    threads: int
    wide: bool = False
    """Within apb's `WideLinears`."""
    targets: int = 0
    """How many of the last tokens to return log-probabilities of instead of measuring."""
    started: float = 0.0
    """`time.time()` when the process was started."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HfResult:
    """A prefill up to the logits of the first new token."""

    load_s: float
    prefill_s: float
    baseline_bytes: int
    weight_bytes: int
    peak_bytes: int


def _load(job: HfJob) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()
    config = compose_config(job.overrides)
    checkpoint = Checkpoint.find(config.model)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        checkpoint.location,
        **checkpoint.options,
        dtype=DTYPES[config.dtype],
        attn_implementation="sdpa",
    )
    model.eval()
    return model


@torch.inference_mode()
def measure(job: HfJob) -> HfResult:
    baseline = resident_bytes("self")
    model = _load(job)
    load_s = time.time() - job.started
    memory = PeakMemory(torch.device("cpu"))
    with WideLinears() if job.wide else nullcontext():
        _prefill(model, job.token_ids[:_WARM_UP_TOKENS])
        memory.reset()
        begin = time.perf_counter()
        _prefill(model, job.token_ids)
        prefill_s = time.perf_counter() - begin
    return HfResult(
        load_s=load_s,
        prefill_s=prefill_s,
        baseline_bytes=baseline,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        peak_bytes=memory.read(),
    )


def _prefill(model: PreTrainedModel, token_ids: list[int]) -> None:
    """As a user would: the cache is kept, and only the last row's logits are computed."""
    output = model(input_ids=torch.tensor([token_ids]), use_cache=True, logits_to_keep=1)
    assert output.past_key_values.get_seq_length() == len(token_ids)


@torch.inference_mode()
def score(job: HfJob) -> list[float]:
    ids_T = torch.tensor(job.token_ids)
    logits_TV = _load(job)(input_ids=ids_T[None], logits_to_keep=job.targets + 1).logits[0, :-1]
    targets_T1 = ids_T[-job.targets :, None]
    values: list[float] = logits_TV.float().log_softmax(dim=-1).gather(1, targets_T1)[:, 0].tolist()
    return values


def main() -> None:
    job = HfJob(**json.load(sys.stdin))
    torch.set_num_threads(job.threads)
    result: Any = score(job) if job.targets else asdict(measure(job))
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
