"""From the measurements of the overlap benchmark to its tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from apb.markdown import table
from benchmarks.environment import Environment
from benchmarks.overlap_rank import LayerTimes
from benchmarks.report import Spread

_BAR = 0.2
_MODE = {True: "overlap", False: "in turn"}
_MIN_CPU_SHARE = 0.97
"""Of the time in which no rank waits; below it another program had the processor meanwhile."""
_MIN_LAYERS = 8
"""Undisturbed ones, for a prefill to be counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer on one rank, from its exchange to the next one's, in seconds."""

    period: float
    cpu: float
    """What the rank's main thread had of a processor."""
    local: float
    """Local attention, known where the exchange runs beside it."""
    wait: float
    """For the exchange."""
    attention: float
    """From asking for the exchange until it and local attention are there."""

    @classmethod
    def between(cls, this: LayerTimes, following: LayerTimes) -> Layer:
        return cls(
            period=following.asked - this.asked,
            cpu=following.cpu - this.cpu,
            local=this.awaited - this.posted,
            wait=this.arrived - this.awaited,
            attention=this.used - this.asked,
        )

    @property
    def undisturbed(self) -> bool:
        return self.cpu > _MIN_CPU_SHARE * (self.period - self.wait)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefill:
    """One prefill; `gbit` is None without a limit, `ranks` what each rank reported."""

    gbit: float | None
    overlap: bool
    repeat: int
    ranks: list[dict[str, Any]]

    @property
    def seconds(self) -> float:
        """Of the slowest rank; all began together."""
        return float(max(rank["seconds"] for rank in self.ranks))

    def layers(self, rank: int) -> list[Layer]:
        """All but the last one, which no other exchange follows."""
        times = [LayerTimes(**layer) for layer in self.ranks[rank]["layers"]]
        return [Layer.between(*pair) for pair in pairwise(times)]

    def undisturbed(self, rank: int) -> list[Layer]:
        """The layers in which every rank had a processor."""
        by_rank = [self.layers(other) for other in range(len(self.ranks))]
        together = zip(*by_rank, strict=True)
        return [layers[rank] for layers in together if all(x.undisturbed for x in layers)]

    def line(self) -> str:
        waits = (sum(x.wait for x in self.layers(rank)) for rank in range(len(self.ranks)))
        return (
            f"#{self.repeat:>2} {link_name(self.gbit):>10} {_MODE[self.overlap]}  prefill "
            f"{self.seconds:.2f} s  waited {' '.join(f'{wait:.2f}' for wait in waits)} s  "
            f"undisturbed layers {len(self.undisturbed(0))}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Exchange:
    """Exchanges of one layer on their own, `seconds` of each on each rank."""

    gbit: float | None
    repeat: int
    ranks: list[dict[str, Any]]
    busy_s: float
    """Processor time of the whole machine, per exchange."""

    @property
    def seconds(self) -> list[float]:
        """Of the rank that was done last."""
        return [max(times) for times in zip(*(r["seconds"] for r in self.ranks), strict=True)]


class Findings:
    """What the measurements say, seen from the rank that takes longest."""

    def __init__(
        self, prefills: Sequence[Prefill], exchanges: Sequence[Exchange], *, gbit: float
    ) -> None:
        self._prefills, self._exchanges, self.gbit = prefills, exchanges, gbit
        by_rank = zip(*([rank["seconds"] for rank in p.ranks] for p in prefills), strict=True)
        totals = [sum(seconds) for seconds in by_rank]
        self.rank = totals.index(max(totals))
        self.num_layers = len(prefills[0].ranks[self.rank]["layers"])
        self.received_bytes: int = exchanges[0].ranks[self.rank]["received_bytes"]

    def of(self, gbit: float | None, overlap: bool) -> list[Prefill]:
        """The prefills of a variant, in the order of the repeats."""
        chosen = [p for p in self._prefills if (p.gbit, p.overlap) == (gbit, overlap)]
        return sorted(chosen, key=lambda prefill: prefill.repeat)

    def layers(self, gbit: float | None, overlap: bool) -> list[Layer]:
        """A variant's undisturbed layers."""
        return [x for prefill in self.of(gbit, overlap) for x in prefill.undisturbed(self.rank)]

    def exchange_s(self, gbit: float | None) -> Spread:
        """One layer's exchange on its own."""
        return Spread.of([s for e in self._exchanges if e.gbit == gbit for s in e.seconds])

    def busy_s(self, gbit: float | None) -> float:
        """Processor time of the whole machine that an exchange takes."""
        return statistics.median([e.busy_s for e in self._exchanges if e.gbit == gbit])

    @property
    def local_s(self) -> float | None:
        """One layer's local attention, without a limit on the link."""
        layers = self.layers(None, True)
        return statistics.median([x.local for x in layers]) if layers else None

    def shares(self, overlap: bool) -> dict[str, Spread | None]:
        """Parts of the exchange on its own that the slow link adds, one for each repeat.

        The base is the same repeat's prefill with overlap on the link without a limit. None where
        no repeat has enough undisturbed layers.
        """
        alone_s = self.exchange_s(self.gbit).median

        def whole(prefill: Prefill) -> float:
            return prefill.seconds / self.num_layers

        def share_by(layer_s: Callable[[Prefill], float], *, clean: bool) -> Spread | None:
            pairs = zip(self.of(self.gbit, overlap), self.of(None, True), strict=True)
            shares = [
                (layer_s(slow) - layer_s(base)) / alone_s
                for slow, base in pairs
                if not clean
                or min(len(p.undisturbed(self.rank)) for p in (slow, base)) >= _MIN_LAYERS
            ]
            return Spread.of(shares) if shares else None

        return {
            "prefill": share_by(whole, clean=False),
            "attention": share_by(
                lambda p: statistics.median([x.attention for x in p.undisturbed(self.rank)]),
                clean=True,
            ),
            "waiting": share_by(
                lambda p: statistics.fmean([x.wait for x in p.undisturbed(self.rank)]),
                clean=True,
            ),
        }


def link_name(gbit: float | None) -> str:
    return "no limit" if gbit is None else f"{gbit:g} Gbit/s"


def render(
    prefills: Sequence[Prefill],
    exchanges: Sequence[Exchange],
    environment: Environment,
    settings: Mapping[str, Any],
) -> list[str]:
    """The report in Markdown."""
    found = Findings(prefills, exchanges, gbit=settings["gbit"])
    slow = link_name(found.gbit)
    return [
        f"# Exchange behind attention: {settings['model']}, {settings['dtype']}, {slow}",
        "",
        *environment.lines(),
        f"* {settings['tokens']} random tokens, {settings['ranks']} ranks of {settings['threads']} "
        f"thread(s), {settings['blocks']} blocks each, "
        f"method.anchor_len={settings['anchor_len']}, "
        f"method.passing_len={settings['passing_len']}, "
        f"overrides `{' '.join(settings['override']) or 'none'}`; {settings['repeats']} repeats, "
        "variants alternating in the same processes",
        f"* link: {settings['link']}",
        "* the first-token logits of all prefills are the same, bit by bit",
        f"* rank {found.rank} takes longest and all figures are its own: it receives "
        f"{found.received_bytes / 1e6:.2f} MB in each of {found.num_layers} layers"
        f"{_relation(found)}",
        "",
        "## Exchange on its own",
        "",
        "The same messages with no compute beside them; median (smallest to largest), and what "
        "they take of this machine's processors, the emulated link included.",
        "",
        *_exchange_table(found),
        "",
        "## Prefill",
        "",
        "`overlap`: the exchange runs while local attention does. `in turn`: local attention "
        "begins when it is done. Attention is timed from asking for the exchange until it and "
        "local attention are there, which is all that a slow link can lengthen; the median. Wait "
        "is the time of it in which the rank waited; the mean. Both are of undisturbed layers, in "
        f"which every rank had a processor for {_MIN_CPU_SHARE:.0%} of the time from one exchange "
        "to the next, waiting left out.",
        "",
        *_prefill_table(found),
        "",
        "## Visible share",
        "",
        f"What {slow} adds to a prefill with overlap and no limit, as a part of the exchange on "
        "its own, in percent; one value for each repeat, median (smallest to largest). By prefill: "
        "its seconds, disturbed layers included. By attention and by waiting: as above, where a "
        f"prefill has {_MIN_LAYERS} undisturbed layers; by attention includes what the transfer "
        f"takes from the computation beside it. With overlap the bar is {_BAR:.0%}; in turn, about "
        "100 % is to be expected.",
        "",
        *_share_table(found),
        "",
        _verdict(found),
    ]


def _relation(found: Findings) -> str:
    if found.local_s is None:
        return ""
    share = found.exchange_s(found.gbit).median / found.local_s
    return (
        f"; its exchange on its own takes {share:.0%} of its local attention of "
        f"{1e3 * found.local_s:.1f} ms a layer"
    )


def _exchange_table(found: Findings) -> list[str]:
    rows = []
    for gbit in (found.gbit, None):
        seconds = found.exchange_s(gbit)
        milliseconds = Spread(*(1e3 * value for value in seconds)).text()
        total = f"{found.num_layers * seconds.median:.2f}"
        rate = f"{8 * found.received_bytes / seconds.median / 1e9:.2f}"
        busy = f"{1e3 * found.busy_s(gbit):.1f}"
        rows.append([link_name(gbit), milliseconds, total, rate, busy])
    return table(["link", "ms a layer", "s in all layers", "Gbit/s", "processor ms"], rows)


def _prefill_table(found: Findings) -> list[str]:
    rows = []
    for gbit in (None, found.gbit):
        for overlap in (True, False):
            own, layers = found.of(gbit, overlap), found.layers(gbit, overlap)
            figures = ["", ""]
            if layers:
                median = statistics.median([x.attention for x in layers])
                mean = statistics.fmean([x.wait for x in layers])
                figures = [f"{1e3 * median:.1f}", f"{1e3 * mean:.2f}"]
            count = f"{len(layers)} of {sum(len(p.layers(found.rank)) for p in own)}"
            seconds = Spread.of([prefill.seconds for prefill in own]).text()
            rows.append([f"{link_name(gbit)}, {_MODE[overlap]}", seconds, count, *figures])
    return table(["variant", "prefill s", "undisturbed layers", "attention ms", "wait ms"], rows)


def _share_table(found: Findings) -> list[str]:
    rows = []
    for overlap in (True, False):
        cells = [
            "" if share is None else Spread(*(100 * value for value in share)).text()
            for share in found.shares(overlap).values()
        ]
        rows.append([_MODE[overlap], *cells])
    return table(["variant", "by prefill", "by attention", "by waiting"], rows)


def _verdict(found: Findings) -> str:
    """By what the slow link adds to the wait; ranks also wait for one another without a limit."""
    hidden, plain = found.layers(found.gbit, True), found.layers(None, True)
    if not hidden or not plain:
        return "The bar is not decided: other programs disturbed the processors too much."
    wait_s, base_s = (statistics.fmean([x.wait for x in layers]) for layers in (hidden, plain))
    share = max(0.0, wait_s - base_s) / found.exchange_s(found.gbit).median
    slower_s = statistics.median([x.attention for x in hidden])
    slower_s -= statistics.median([x.attention for x in plain])
    busy_s = found.busy_s(found.gbit) - found.busy_s(None)
    return (
        f"The bar is {'met' if share < _BAR else 'missed'}: with overlap a rank waits "
        f"{1e3 * wait_s:.2f} ms a layer on the limited link and {1e3 * base_s:.2f} ms without a "
        f"limit; the difference is {share:.1%} of an exchange's own duration. Attention takes "
        f"{1e3 * slower_s:+.1f} ms a layer beside the limited link. Limiting it takes "
        f"{1e3 * busy_s:.1f} ms of processor time an exchange, on the processors that attend; a "
        "network card would do that itself."
    )
