"""`python -m apb.calibrate [device=auto|cpu|cuda] [dtype=auto|float32|...] [threads=N]`

The rates of one rank are measured in about 15 seconds and kept beside the models; runs on the same
device, dtype and number of threads then plan by them. Give `threads` as a rank will have them: with
several ranks on the CPU that is what OMP_NUM_THREADS sets, or the cores shared out among the ranks.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

from apb.calibration import keep_rates
from apb.cost import NOMINAL_GPU, Rates
from apb.errors import ApbError, InputError
from apb.hf.model import DTYPES, choose_dtype
from apb.link_bench import LinkRates, measure_link
from apb.metrics import usable_cores
from apb.rates_bench import RankBench, Sizes
from apb.worker import choose_device


class Options(NamedTuple):
    """What to measure; `threads` only matters on the CPU."""

    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0
    """0: torch's own choice, which OMP_NUM_THREADS overrides."""


_CHOICES = {"device": ("auto", "cpu", "cuda"), "dtype": ("auto", *DTYPES)}


def parse(arguments: Sequence[str]) -> Options:
    """Options from ``key=value`` words.

    Raises:
        InputError: an unknown key or a value out of range.
    """
    options = Options()
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in Options._fields or not equals:
            known = ", ".join(f"{name}=" for name in Options._fields)
            raise InputError(f"unknown option {argument}: choose from {known}")
        if key == "threads":
            options = options._replace(threads=_thread_count(value))
        elif value not in _CHOICES[key]:
            raise InputError(f"{key}={value} must be one of {', '.join(_CHOICES[key])}")
        elif key == "device":
            options = options._replace(device=value)
        else:
            options = options._replace(dtype=value)
    return options


def _thread_count(value: str) -> int:
    most = usable_cores()
    if not value.isascii() or not value.isdecimal() or not 1 <= int(value) <= most:
        raise InputError(f"threads={value} must be a number from 1 to this machine's {most} cores")
    return int(value)


def calibrate(options: Options) -> tuple[Rates, Path]:
    """Measure and keep the rates; returns them and their file.

    Raises:
        InputError: no such device.
        ApbError: the link could not be measured.
    """
    device = choose_device(options.device, 0)
    dtype = choose_dtype(options.dtype, device)
    if options.threads:
        torch.set_num_threads(options.threads)
    link, remark = _link(device)
    bench = RankBench(device, dtype, Sizes.of(device))
    rates = Rates(
        linear_flops=bench.linear_flops(),
        attention_flops=bench.attention_flops(),
        memory_bytes=bench.memory_bytes(),
        link_bytes=link.link_bytes,
        latency_s=link.latency_s,
        source=f"measured on {_machine(device)}, {date.today().isoformat()}{remark}",
    )
    return rates, keep_rates(rates, device, dtype)


def _link(device: torch.device) -> tuple[LinkRates, str]:
    """The rates between two ranks, and what the user should know about them."""
    if device.type == "cuda" and torch.cuda.device_count() == 1:
        nominal = LinkRates(NOMINAL_GPU.link_bytes, NOMINAL_GPU.latency_s)
        return nominal, " (one GPU: the link's figures are NVLink's nominal ones)"
    return measure_link(device.type), ""


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.node()}, {threads} thread{'s' if threads > 1 else ''} a rank"


def rates_table(rates: Rates) -> list[str]:
    """Lines of plain text."""
    rows = [
        ("linear layers", f"{rates.linear_flops / 1e9:.1f} GFLOP/s"),
        ("attention", f"{rates.attention_flops / 1e9:.1f} GFLOP/s"),
        ("weights read", f"{rates.memory_bytes / 1e9:.2f} GB/s"),
        ("from another rank", f"{rates.link_bytes / 1e9:.2f} GB/s"),
        ("small message", f"{rates.latency_s * 1e6:.0f} us"),
    ]
    return [rates.source, *(f"{name:<18}{value:>16}" for name, value in rows)]


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"-h", "--help"}.intersection(arguments):
        print(__doc__)  # noqa: T201
        return 0
    try:
        rates, path = calibrate(parse(arguments))
    except ApbError as error:
        print(f"apb.calibrate: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except OSError as error:
        print(f"apb.calibrate: the rates could not be stored: {error}", file=sys.stderr)  # noqa: T201
        return 1
    except KeyboardInterrupt:
        return 130
    print("\n".join([*rates_table(rates), f"kept in {path}"]))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
