"""How estimates are shown: one document in detail, or lengths against ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch

from apb.config import RunConfig
from apb.cost import CostModel
from apb.errors import InputError
from apb.estimate import Estimate, break_even
from apb.methods.base import AttentionMethod
from apb.methods.plan import PlanRequest
from apb.plot import plot_lines

_KI, _MI = 2**10, 2**20
LENGTHS = (8 * _KI, 32 * _KI, 128 * _KI, 512 * _KI, _MI, 4 * _MI, 10_000_000)
_MOST_RANKS = 1024
EXACT = ("full", "ring", "zigzag", "ulysses")
"""Methods without settings."""


class Outlook(Protocol):
    """A configuration whose methods can be estimated."""

    config: RunConfig
    dtype: torch.dtype
    chosen: str
    """The method that is set."""
    methods: Mapping[str, AttentionMethod]

    @property
    def memory(self) -> float | None:
        """Bytes of a rank's device; None where they are not known."""

    def costs(self, world_size: int) -> CostModel: ...
    def request(self, context_len: int, world_size: int) -> PlanRequest: ...
    def estimate(self, name: str, context_len: int, world_size: int) -> Estimate:
        """Raises InputError where the method cannot run so."""


def document_lines(outlook: Outlook, context_len: int, world_size: int) -> list[str]:
    """All methods for one document, and the ranks of the chosen one."""
    costs = outlook.costs(world_size)
    chosen = outlook.estimate(outlook.chosen, context_len, world_size)
    lines = [
        f"{outlook.config.model.name}, {context_len} tokens, {_ranks(world_size)}, "
        f"{str(outlook.dtype).removeprefix('torch.')}",
        f"weights {_gib(costs.weight_bytes)}, KV {_gib(costs.kv_bytes(context_len))} in all"
        + (f", memory of a rank {_gib(outlook.memory)}" if outlook.memory else ""),
        f"rates: {costs.rates.source}",
        "",
        "method      prefill       TTFT  TPOT sharded  TPOT rank0    received  peak memory    "
        "PFLOP",
    ]
    for name in outlook.methods:
        try:
            estimate = outlook.estimate(name, context_len, world_size)
        except InputError as error:
            lines.append(f"{name:<8}  {error}")
            continue
        lines.append(_method_line(outlook, costs, name, estimate))
    blocks = len(chosen.plan.layout.blocks)
    lines += [
        "",
        f"{outlook.chosen} in {blocks} blocks:",
        "rank        rows      cached    received  peak memory   prefill",
        *_rank_lines(chosen),
        *(f"note: {note}" for note in chosen.plan.notes),
        _break_even_line(outlook, world_size),
    ]
    return lines


def _method_line(outlook: Outlook, costs: CostModel, name: str, estimate: Estimate) -> str:
    on_rank0 = estimate.rank0_bytes(costs)
    fits_rank0 = outlook.memory is None or on_rank0 <= outlook.memory
    rank0 = f"{1e3 * estimate.rank0_step_s(costs):.1f} ms" if fits_rank0 else "no room"
    return (
        f"{name:<8}  {_seconds(estimate.prefill_s):>9}  {_seconds(estimate.ttft_s):>9}  "
        f"{1e3 * estimate.tpot_s:>9.1f} ms  {rank0:>10}  {_gib(estimate.received_bytes):>10}  "
        f"{_gib(estimate.peak_bytes):>11}  {estimate.flops / 1e15:>7.2f}"
        + _shortage(outlook, estimate)
    )


def _shortage(outlook: Outlook, estimate: Estimate) -> str:
    """What is missing, where the document does not fit."""
    if outlook.memory is None or estimate.peak_bytes <= outlook.memory:
        return ""
    return f"  does not fit: {_gib(estimate.peak_bytes - outlook.memory)} too much on a rank"


def _rank_lines(estimate: Estimate) -> Iterator[str]:
    for number, rank in enumerate(estimate.ranks):
        yield (
            f"{number:>4}  {rank.rows:>10}  {rank.cached:>10}  {_gib(rank.received_bytes):>10}  "
            f"{_gib(rank.peak_bytes):>11}  {rank.prefill_s:>8.2f} s"
        )


def _break_even_line(outlook: Outlook, world_size: int) -> str:
    if "apb" not in outlook.methods or world_size == 1:
        return "break-even: needs several ranks"
    exact = {name: outlook.methods[name] for name in EXACT}
    length = break_even(outlook.methods["apb"], exact, outlook.request(1, world_size))
    if length is None:
        return f"break-even: never on {_ranks(world_size)}"
    return f"break-even: apb is predicted faster than every exact method from {length} tokens on"


def overview_lines(outlook: Outlook, world_size: int) -> list[str]:
    """Seconds to the first token by length and method, and how many ranks each length needs."""
    costs = outlook.costs(world_size)
    names = list(outlook.methods)
    lines = [
        f"{outlook.config.model.name}, {str(outlook.dtype).removeprefix('torch.')}, weights "
        f"{_gib(costs.weight_bytes)}",
        f"rates: {costs.rates.source}",
        "",
        f"seconds to the first token on {_ranks(world_size)}",
        f"{'tokens':>8}" + "".join(f"{name:>11}" for name in names) + "   apb, fastest exact",
    ]
    for length in LENGTHS:
        seconds = {name: _ttft(outlook, name, length, world_size) for name in names}
        cells = "".join(f"{_cell(value):>11}" for value in seconds.values())
        lines.append(f"{_tokens(length):>8}{cells}   {_gain(seconds)}")
    lines += [_break_even_line(outlook, world_size), ""]
    if outlook.memory is None:
        return [*lines, "how many ranks a length needs: add hardware=NAME"]
    lines += [
        f"fewest ranks of {_gib(outlook.memory)} that hold a document with {outlook.chosen}, by "
        "powers of two",
        "  tokens  ranks       TTFT       TPOT  peak memory",
        *(_fewest_line(outlook, length) for length in LENGTHS),
    ]
    return lines


def _gain(seconds: Mapping[str, float | str]) -> str:
    """How much sooner `apb` answers than the exact methods that fit."""
    ours = seconds["apb"]
    exact = {name: value for name in EXACT if isinstance(value := seconds[name], float)}
    if isinstance(ours, str) or not exact:
        return "" if isinstance(ours, str) else "only apb fits"
    best = min(exact, key=lambda name: exact[name])
    return f"{exact[best] / ours:.2f}x {best}"


def _ttft(outlook: Outlook, name: str, length: int, world_size: int) -> float | str:
    try:
        estimate = outlook.estimate(name, length, world_size)
    except InputError:
        return "-"
    return "no room" if _shortage(outlook, estimate) else estimate.ttft_s


def _fewest_line(outlook: Outlook, length: int) -> str:
    line, world_size = f"{_tokens(length):>8}", 1
    while world_size <= _MOST_RANKS:
        try:
            estimate = outlook.estimate(outlook.chosen, length, world_size)
        except InputError as error:  # more ranks than the method can use
            return f"{line}; {error}"
        shortage = _shortage(outlook, estimate)
        line = (
            f"{_tokens(length):>8}  {world_size:>5}  {_seconds(estimate.ttft_s):>9}  "
            f"{1e3 * estimate.tpot_s:>6.1f} ms  {_gib(estimate.peak_bytes):>11}{shortage}"
        )
        if not shortage:
            break
        world_size *= 2
    return line


def plot_outlook(outlook: Outlook, world_size: int, path: Path) -> Path:
    """Seconds to the first token against length, for the methods that fit.

    Raises:
        ApbError: matplotlib is not installed.
    """
    series = {}
    for name in outlook.methods:
        values = ((x, _ttft(outlook, name, x, world_size)) for x in LENGTHS)
        points = [(float(x), y) for x, y in values if isinstance(y, float)]
        if points:
            series[name] = points
    return plot_lines(
        path,
        series,
        title=f"{outlook.config.model.name} on {_ranks(world_size)}",
        x_label="tokens",
        y_label="seconds to the first token",
    )


def _cell(value: float | str) -> str:
    return value if isinstance(value, str) else _seconds(value)


def _seconds(value: float) -> str:
    if value < 1000:
        return f"{value:.2f} s"
    return f"{value:,.0f} s" if value < 100_000 else f"{value / 86400:,.1f} d"


def _tokens(count: int) -> str:
    if count % _MI == 0:
        return f"{count // _MI}M"
    return f"{count // _KI}K" if count % _KI == 0 else f"{count // 1_000_000}M"


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
