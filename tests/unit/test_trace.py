"""The parts of a trace without ranks: clocks, records, activities, and a page of a large run."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apb.attention.base import LayerInputs, masked_attention
from apb.cache import CacheShape, KVCacheShard
from apb.clock import Alignment, Offset, Reading, align
from apb.errors import InputError
from apb.layout import SequenceLayout
from apb.methods import attended
from apb.methods.attended import BlockObserver
from apb.output import RankLayout, RequestMetrics, RequestOutput, trace_paths
from apb.prompts.source import PromptText
from apb.run import _deliver
from apb.trace.activity import Activity, seconds_by_activity, slices_of, window
from apb.trace.recorder import MAX_RECORDS, OFF, Recorder
from apb.trace.records import (
    SINK_TOKENS,
    AttendedLayer,
    Message,
    Phase,
    RankTrace,
    RunTrace,
    Sample,
    Span,
)

CPU = torch.device("cpu")
MS = 1_000_000


class Gathers:
    """Gathers of two machines at true times, as each of them reads its own clock."""

    def __init__(self, offset_ns: int, drift: float) -> None:
        self._offset_ns, self._drift = offset_ns, drift

    def theirs(self, time_ns: int) -> int:
        return time_ns + self.offset_at(time_ns)

    def offset_at(self, time_ns: int) -> int:
        return self._offset_ns + int(self._drift * time_ns)

    def readings(self, start_ns: int, stays: Sequence[Sequence[int]]) -> tuple[Reading, Reading]:
        """`stays` are when each of the two enters, and how long after both it leaves."""
        owner, other = [], []
        for first, second, first_leaves, second_leaves in stays:
            enters = start_ns + first, start_ns + second
            full = max(enters)
            start_ns = full + max(first_leaves, second_leaves)
            owner.append([enters[0], full + first_leaves])
            other.append([self.theirs(enters[1]), self.theirs(full + second_leaves)])
        return Reading("a", owner), Reading("b", other)


STAYS = st.lists(st.tuples(*[st.integers(0, 5 * MS)] * 4), min_size=1, max_size=8)


@given(st.integers(-(10**15), 10**15), STAYS)
def test_the_true_offset_of_a_clock_is_within_its_bound(
    offset_ns: int, stays: list[tuple[int, ...]]
) -> None:
    owner, other = Gathers(offset_ns, 0.0).readings(10**12, stays)
    found = Offset.between(other, owner)
    assert abs(found.offset_ns - offset_ns) <= found.error_ns
    assert found.error_ns <= min(sum(stay) for stay in stays)


@given(st.integers(-(10**12), 10**12), st.floats(-1e-4, 1e-4), STAYS, STAYS)
def test_a_clock_that_drifts_is_followed(
    offset_ns: int, drift: float, before: list[tuple[int, ...]], after: list[tuple[int, ...]]
) -> None:
    clocks = Gathers(offset_ns, drift)
    start_ns, end_ns = 10**11, 3 * 10**11
    first, last = clocks.readings(start_ns, before), clocks.readings(end_ns, after)
    mine, theirs = align(first, last)
    assert mine.error_ns == 0
    assert mine.owner_time(start_ns) == start_ns
    slack = 20_000  # what drifts while clocks are read
    for time_ns in (start_ns, (start_ns + end_ns) // 2, end_ns):
        error = abs(theirs.owner_time(clocks.theirs(time_ns)) - time_ns)
        assert error <= theirs.error_ns + slack


def test_ranks_of_one_machine_share_a_clock() -> None:
    here = Reading("a", [[5, 9]])
    assert Offset.between(here, Reading("a", [[1, 2]])) == (0, 0, 0)
    assert Alignment(Offset(0, 0, 0), Offset(0, 0, 0)).owner_time(7) == 7


def test_a_recorder_writes_down_what_it_is_told_and_forgets_it_at_the_next_request() -> None:
    trace = Recorder(CPU, lambda: (7, 9))
    with trace.span(Phase.STEP) as step:
        with trace.span(Phase.PASS, 3):
            pass
        step.tell(nodes=4)
    posted = trace.mark()
    trace.waited("upstream", 2, 5, posted, trace.mark())
    trace.received(100, [1])
    trace.received(20, [2])
    trace.sample()
    trace.sample()
    begin_ns, (inner, outer), [message], [sample] = trace.records()
    assert (inner.phase, inner.layer, outer.phase, outer.layer) == (Phase.PASS, 3, Phase.STEP, -1)
    assert begin_ns <= outer.begin_ns <= inner.begin_ns <= inner.end_ns <= outer.end_ns
    assert outer.detail == {"nodes": 4}
    assert message[:3] == ("upstream", 2, 5)
    assert (message.nbytes, message.sources) == (120, [1, 2])
    assert sample[1:] == (7, 9)
    trace.begin()
    assert trace.records()[1:] == ([], [], [])


def test_a_recorder_stops_before_a_trace_becomes_unreadable() -> None:
    trace = Recorder(CPU, lambda: (0, 0))
    for _ in range(MAX_RECORDS + 10):
        trace.add(Phase.MLP, 0, 1, 2)
        trace.waited("partial", 1, 0, 1, 2)
        trace.received(1, [0])
    _, spans, messages, _ = trace.records()
    assert len(spans) == len(messages) == MAX_RECORDS
    assert messages[-1].nbytes == 1


def test_a_trace_that_is_off_records_nothing() -> None:
    with OFF.span(Phase.PASS) as scope:
        scope.tell(nodes=1)
    OFF.sample()
    assert not OFF.is_on
    assert OFF.records() == (0, [], [], [])


def part_of(spans: Sequence[Span], messages: Sequence[Message] = ()) -> RankTrace:
    return RankTrace("host", 1, "cpu", 0, 0, list(spans), list(messages), [], [])


@st.composite
def nested(draw: st.DrawFn, begin: int = 0, end: int = 1000, depth: int = 3) -> list[Span]:
    """Spans that lie within one another or apart, as a thread records them: inner ones first."""
    edges = sorted(draw(st.lists(st.integers(begin, end), max_size=6)))
    spans = []
    for start, stop in zip(edges[::2], edges[1::2], strict=False):
        if depth:
            spans += draw(nested(start, stop, depth - 1))
        spans.append(Span(draw(st.sampled_from(Phase)), 0, start, stop, {}))
    return spans


@given(nested())
def test_slices_cover_what_spans_cover_once(spans: list[Span]) -> None:
    slices = slices_of(part_of(spans))
    assert all(earlier.end_ns <= later.begin_ns for earlier, later in pairwise(slices))
    covered = {time for span in spans for time in range(span.begin_ns, span.end_ns)}
    assert sum(each.end_ns - each.begin_ns for each in slices) == len(covered)


def test_an_inner_phase_hides_the_outer_one() -> None:
    wait = Message("upstream", 1, 0, 20, 30, 60, 5, [0])
    spans = [Span(Phase.COMPRESS, 0, 10, 20, {}), Span(Phase.ATTENTION, 0, 0, 100, {})]
    part = part_of([*spans, Span(Phase.PREFILL, -1, 0, 120, {})], [wait])
    seconds = seconds_by_activity(slices_of(part), *window(part, Phase.PREFILL))
    assert {activity: round(1e9 * value) for activity, value in seconds.items()} == {
        Activity.COMPRESS: 10,
        Activity.WAIT: 30,
        Activity.ATTENTION: 60,
        Activity.OTHER: 20,
    }


@pytest.mark.parametrize("together", [1, 3, 4, 99])
def test_shares_of_blocks_are_those_of_dense_attention(
    together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads, kv_heads, rows, dim, scale = 4, 2, 3, 8, 0.7
    layout = SequenceLayout.even(50, num_blocks=3, world_size=2)
    k_KSD = torch.randn(kv_heads, 50 + rows, dim)
    q_HTD = torch.randn(heads, rows, dim)
    visible_TS = torch.ones(rows, 50 + rows, dtype=torch.bool).tril(50)
    lse_TH = masked_attention(q_HTD, k_KSD, k_KSD, visible_TS, scale).lse_TH
    scores_HTS = q_HTD @ k_KSD.repeat_interleave(2, dim=0).mT * scale
    probs_HTS = scores_HTS.masked_fill(~visible_TS, -torch.inf).softmax(dim=-1)
    edges = [0, SINK_TOKENS, *(block.stop for block in layout.blocks)]
    expected = torch.stack(
        [probs_HTS[..., start:stop].sum(dim=-1) for start, stop in pairwise(edges)], dim=-1
    )
    cache = KVCacheShard(CacheShape(1, kv_heads, dim, torch.float32), capacity=50, device=CPU)
    cache.write(0, k_KSD[:, :50], k_KSD[:, :50])
    cache.commit(torch.arange(50))
    monkeypatch.setattr(attended, "_CHUNK", 7)
    monkeypatch.setattr(attended, "_TOGETHER", together)
    observer = BlockObserver(layout.blocks, cache, num_layers=1)
    passes = [[0, 2], [1], [2, 0, 1], [1]]
    for kept in passes:
        observer.observe(LayerInputs(0, q_HTD, k_KSD, k_KSD, scale), lse_TH)
        observer.keep(kept)
        observer.keep([0])  # a pass that no layer of which was observed
    [found] = observer.findings()
    assert found.blocks == [-1, 0, 1, 2]
    kept_HTC = expected[:, [row for kept in passes for row in kept]]
    torch.testing.assert_close(torch.tensor(found.means), kept_HTC.mean(dim=0))
    torch.testing.assert_close(torch.tensor(found.peaks), kept_HTC.amax(dim=0))


def large_run(ranks: int = 8, layers: int = 80, tokens: int = 300) -> RequestOutput:
    """A made-up run of the size that a page has to bear."""
    parts = [_large_rank(rank, layers, tokens) for rank in range(ranks)]
    metrics = RequestMetrics(
        context_tokens=131072,
        query_tokens=30,
        generated_tokens=tokens,
        model="a <large> model",
        method="apb",
        num_blocks=ranks,
        backend="fused",
        drafter="hybrid",
        placement="sharded",
        layout=[
            RankLayout(blocks=[[9 * rank, 9 * rank + 9]], tokens_run=9, tokens_cached=9)
            for rank in range(ranks)
        ],
        prefill_s=3.0,
        ttft_s=3.2,
        decode_s=6.0,
        tokens_per_s=50.0,
        bytes_exchanged=[10**9] * ranks,
        peak_memory_bytes=[2 * 10**10] * ranks,
        acceptance_length=2.0,
        tree_nodes=8.0,
        draft_s=0.5,
        versions={"apb": "0"},
        device="a GPU",
        dtype="bfloat16",
        notes=["a & b"],
    )
    trace = RunTrace.of(parts, [f"<t{index}>" for index in range(tokens)])
    return RequestOutput(
        text="<b>bold</b>",
        token_ids=list(range(tokens)),
        finish_reason="stop",
        metrics=metrics,
        trace=trace,
    )


def _large_rank(rank: int, layers: int, tokens: int) -> RankTrace:
    spans, messages = [Span(Phase.PREFILL, -1, 0, layers * 40 * MS, {})], []
    for layer in range(layers):
        begin = layer * 40 * MS
        edges = [begin, begin + 5 * MS, begin + 25 * MS, begin + 28 * MS, begin + 40 * MS]
        phases = (Phase.PROJECTIONS, Phase.ATTENTION, Phase.OUTPUT, Phase.MLP)
        for phase, edge in zip(phases, pairwise(edges), strict=True):
            spans.append(Span(phase, layer, *edge, {}))
        at = begin + 20 * MS
        sources = list(range(rank))
        messages.append(Message("upstream", 1, layer, at - MS, at, at + rank * MS // 4, 9, sources))
    end = layers * 40 * MS
    for step in range(tokens // 2):
        begin = end + step * 20 * MS
        spans.append(Span(Phase.PASS, -1, begin, begin + 15 * MS, {}))
        spans.append(Span(Phase.STEP, -1, begin, begin + 20 * MS, {"nodes": 8, "tokens": 2}))
    samples = [Sample(step * MS, 10**9 + step, step) for step in range(0, 3000, 50)]
    share = [[0.01] for _ in range(tokens)]
    attended = [AttendedLayer(layer, [rank], share, share) for layer in (5, 15)]
    return RankTrace(f"node{rank}", rank, "GPU", 1500 * rank, 0, spans, messages, samples, attended)


class Tags(HTMLParser):
    """Checks that tags close, and collects what could reach for the network."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [f"{tag} {key}" for key, _ in attrs if key in ("src", "href", "srcset")]
        self.links += [tag] if tag in ("script", "link", "iframe") else []
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return large_run().write(tmp_path_factory.mktemp("run") / "result.json")


def test_a_run_writes_its_result_its_events_and_its_page(written: list[Path]) -> None:
    result, events, page = written
    assert [path.name for path in written] == ["result.json", "result.trace.json", "result.html"]
    assert set(json.loads(result.read_text())) == {"text", "token_ids", "finish_reason", "metrics"}
    told: dict[str, Any] = json.loads(events.read_text())
    assert told["otherData"]["clock_error_us"][2] == 3.0
    assert {event["pid"] for event in told["traceEvents"]} == set(range(8))
    assert page.stat().st_size < 2**20
    assert len(list(page.parent.iterdir())) == 3


def test_a_page_needs_nothing_beside_itself_and_keeps_text_text(written: list[Path]) -> None:
    tags = Tags()
    page = written[2].read_text()
    tags.feed(page)
    assert tags.open == []
    assert tags.links == []
    assert "@import" not in page
    assert "url(" not in page
    for words in ("<b>bold</b>", "a <large> model", "Note: a & b.", "node7", "rank 7"):
        assert words in tags.text
    for chart in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(chart)


@pytest.mark.parametrize(("ranks", "layers", "tokens"), [(1, 1, 2), (40, 3, 5)])
def test_pages_of_few_and_many_ranks_are_drawn(
    tmp_path: Path, ranks: int, layers: int, tokens: int
) -> None:
    page = large_run(ranks, layers, tokens).write(tmp_path / "x.json")[2].read_text()
    assert page.count("<svg") >= 6


@pytest.mark.parametrize(("blocks", "share"), [([-1], 0.4), ([-1, 0], 0.0)])
def test_a_page_is_drawn_of_a_document_without_blocks_or_without_attention(
    tmp_path: Path, blocks: list[int], share: float
) -> None:
    output = large_run(1, 1, 2)
    assert output.trace is not None
    shares = [[share] * len(blocks)] * 2
    attended = [AttendedLayer(5, blocks, shares, shares)]
    ranks = [rank._replace(attended=attended) for rank in output.trace.ranks]
    output = replace(output, trace=replace(output.trace, ranks=ranks))
    page = output.write(tmp_path / "x.json")[2].read_text()
    assert ("What the answer attended to" in page) == (max(blocks) >= 0)


def test_an_output_survives_the_way_to_its_driver() -> None:
    output = large_run(2, 3, 4)
    assert RequestOutput.from_json(json.loads(json.dumps(output.to_json()))) == output


def test_a_result_is_in_its_file_if_not_on_stdout_and_the_other_way_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt, output = PromptText("document", "Où?"), large_run(2, 3, 4)
    with pytest.raises(InputError, match="cannot be written"):
        _deliver(prompt, output, tmp_path / "gone" / "x.json")
    assert "<b>bold</b>" in capsys.readouterr().out
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(UnicodeEncodeError):
        _deliver(prompt, output, tmp_path / "x.json")
    assert json.loads((tmp_path / "x.json").read_text())["text"] == "<b>bold</b>"


def test_a_result_is_not_written_over_its_own_report() -> None:
    with pytest.raises(InputError, match=r"call the result NAME\.json"):
        trace_paths(Path("x.html"))
