"""What can be measured, and what of it a new machine should be asked first."""

from __future__ import annotations

from typing import NamedTuple

BENCHMARKS = {
    "prefill": "seconds to the first token and memory, beside Hugging Face (CPU)",
    "critical_path": "the slowest rank of a distributed prefill, replayed on one device",
    "attention": "attention over segments beside plain attention, FLOP/s and bytes/s",
    "exchange": "the exchange of passing blocks alone: bytes, GB/s, latency, over gloo or NCCL",
    "decode": "tokens a second of every drafter, beside Hugging Face `generate`",
    "quality": "what approximate methods lose against exact attention",
    "startup": "from a command to its first answer, cold and warm",
    "tracing": "what trace=true adds to a request",
    "break_even": "which method reads a prompt fastest at which length",
    "compressors": "what scoring and selecting passing tokens costs",
    "overlap": "how much of the exchange shows on a slow link (root)",
    "launchers": "what torchrun, local ranks and Ray add to a request",
}


class Job(NamedTuple):
    """One call of a benchmark."""

    name: str
    benchmark: str
    arguments: tuple[str, ...]
    minutes: float
    """On two cores of an EPYC, or on one H100; what has run corrects it."""
    needs: str = ""
    """`root`, `ray` or `gpus` (several)."""


def _job(name: str, minutes: float, arguments: str = "", *, needs: str = "") -> Job:
    benchmark = name.partition(",")[0].replace(" ", "_")
    return Job(name, benchmark, tuple(arguments.split()), minutes, needs)


_BASICS = "--methods apb apb-paper ulysses"
CPU_JOBS = (
    _job("startup", 2, "--repeats 2"),
    _job("exchange", 2, "--contexts 8192 32768 --ranks 2 4 --repeats 5"),
    _job("attention", 4, "--repeats 3"),
    _job("prefill, 2K", 4, "--lengths 2048 --repeats 1"),
    _job("decode, quoting", 5, "--samples 0 --quoting 4 --drafters none hybrid frspec suffix"),
    _job("tracing", 4, "--tokens 2048 --max-tokens 32 --repeats 6"),
    _job("break even, to 2K", 6, "--lengths 512 1024 2048 --repeats 2"),
    _job("quality, 2K", 10, "--lengths 2048 --samples 4 --passages 2 --methods star apb-window"),
    _job("critical path, 16K", 8, f"--model smollm2-135m --context 16384 --repeats 2 {_BASICS}"),
    _job("compressors", 4, "--context 8192 --repeats 3"),
    _job("launchers", 5, "--repeats 5", needs="ray"),
    _job("overlap", 5, "--tokens 2048 --repeats 2", needs="root"),
    _job("exchange, to 128K", 5),
    _job("prefill, to 8K", 45, "--lengths 2048 4096 8192 --repeats 3"),
    _job("decode, all drafters", 30, "--samples 0 --quoting 12"),
    _job("break even, to 8K", 40),
    _job("critical path, 8B", 40, f"--context 8192 --repeats 1 --link-gbit 800 {_BASICS}"),
    _job("quality, all", 300),
    _job("prefill, to 16K", 120),
    _job("critical path, 8B 128K", 240, f"--repeats 1 --warm-ups 0 --link-gbit 800 {_BASICS}"),
)
"""Smallest useful settings first; later ones write over the reports of earlier ones."""

_ON_GPU = "--device cuda"
GPU_JOBS = (
    _job("attention", 4, _ON_GPU),
    _job("critical path, 32K", 4, f"{_ON_GPU} --context 32768 --repeats 2 {_BASICS}"),
    _job("startup", 2, f"{_ON_GPU} --ranks 1 --repeats 2"),
    _job("tracing", 3, "--ranks 1 --tokens 4096 --override device=cuda"),
    _job("compressors", 3, f"{_ON_GPU} --context 32768"),
    _job(
        "decode, quoting",
        5,
        "--samples 0 --quoting 6 --dtype bfloat16 --drafters none hybrid frspec suffix "
        "--no-ranks --override device=cuda",
    ),
    _job(
        "quality, 2K",
        5,
        "--lengths 2048 4096 --samples 8 4 --passages 4 --override device=cuda",
    ),
    _job("exchange", 4, f"{_ON_GPU} --ranks 2", needs="gpus"),
    _job("critical path, to 128K", 10, f"{_ON_GPU} --context 32768 131072"),
    _job(
        "decode, all drafters", 20, "--samples 0 --dtype bfloat16 --no-ranks --override device=cuda"
    ),
    _job("quality, all", 40, "--override device=cuda"),
    _job("critical path, 512K", 20, f"{_ON_GPU} --context 524288 --repeats 1 {_BASICS}"),
)
"""The same on one GPU."""
