"""Traces of real requests: valid events on one clock, all that was sent, and true attention."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch

from apb.comm import Communicator
from apb.config import compose_config
from apb.output import RequestOutput
from apb.runner import RequestRunner
from apb.trace.activity import slices_of
from apb.trace.attention import attended_blocks
from apb.trace.chrome import chrome_trace
from apb.trace.records import Phase, RankTrace, Span
from rank_pool import RankPool

PoolOf = Callable[[int], RankPool]
DOCUMENT = "The mill stood by the river, and the miller kept bees. " * 24
PARAMS = {"max_tokens": 9, "ignore_eos": True}
LAYERS = 2
"""Of the tiny model."""
SETTINGS = ["model=tiny", "device=cpu", "dtype=float32", "method.layout=even"]
APB = [*SETTINGS, "num_blocks=4", "method.min_block_len=16"]
CASES = {
    "apb, sharded": (2, [*APB, "decode.placement=sharded"]),
    "apb, rank 0": (2, [*APB, "decode.placement=rank0"]),
    "apb, one rank": (1, [*APB, "decode.placement=sharded"]),
    "ring": (3, [*SETTINGS[:-1], "method=ring", "drafter=none"]),
}


class Answer(NamedTuple):
    output: RequestOutput
    untraced: list[int]


def ask(comm: Communicator, overrides: Sequence[str]) -> tuple[dict[str, Any], list[int]]:
    """A traced request as a driver would get it, and the tokens of the same one without a trace."""
    runner = RequestRunner(compose_config([*overrides, "trace=true"]), comm)
    arguments = {"document": DOCUMENT, "question": "Who?", "params": PARAMS}
    list(runner.handle("ask", arguments))  # loads the model and warms up
    *_, traced = runner.handle("ask", arguments)
    list(runner.handle("configure", {"overrides": list(overrides)}))
    *_, plain = runner.handle("ask", arguments)
    assert "trace" not in plain["result"]
    return json.loads(json.dumps(traced["result"])), plain["result"]["token_ids"]


@pytest.fixture(scope="module")
def answers(pool_of: PoolOf) -> dict[str, Answer]:
    found = {}
    for name, (world_size, overrides) in CASES.items():
        traced, plain = pool_of(world_size).run(ask, overrides)[0]
        found[name] = Answer(RequestOutput.from_json(traced), plain)
    return found


@pytest.fixture(params=CASES)
def answer(request: pytest.FixtureRequest, answers: dict[str, Answer]) -> Answer:
    return answers[request.param]


def ranks_of(answer: Answer) -> list[RankTrace]:
    assert answer.output.trace is not None
    return answer.output.trace.ranks


def spans_of(part: RankTrace, phase: Phase) -> list[Span]:
    return [span for span in part.spans if span.phase is phase]


def test_a_trace_changes_no_token(answer: Answer) -> None:
    assert answer.output.token_ids == answer.untraced


def test_events_keep_the_trace_event_format(answer: Answer) -> None:
    assert answer.output.trace is not None
    check_format(chrome_trace(answer.output.trace, answer.output.to_json()))


def check_format(trace: dict[str, Any]) -> None:
    """What the format's description asks of the kinds of events that are used here."""
    lanes: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    ends: dict[str, list[tuple[str, float]]] = defaultdict(list)
    arrows: dict[int, dict[str, tuple[float, tuple[int, int]]]] = defaultdict(dict)
    counters: dict[tuple[int, str], list[tuple[float, float]]] = defaultdict(list)
    for event in json.loads(json.dumps(trace))["traceEvents"]:
        assert isinstance(event["pid"], int)
        if event["ph"] == "M":
            continue
        assert event["ts"] >= 0
        lane = event["pid"], event.get("tid", 0)
        match event["ph"]:
            case "X":
                assert event["dur"] >= 0
                begin, dur = (round(1000 * event[key]) for key in ("ts", "dur"))
                lanes[lane].append((begin, begin + dur))
            case "b" | "e":
                ends[event["id"]].append((event["ph"], event["ts"]))
            case "s" | "f":
                arrows[event["id"]][event["ph"]] = event["ts"], lane
            case "C":
                [value] = event["args"].values()
                counters[event["pid"], event["name"]].append((event["ts"], value))
            case other:
                raise AssertionError(f"unexpected kind of event {other}")
    for spans in lanes.values():
        check_nesting(spans)
    for (kind, begin), (other, end) in ends.values():
        assert (kind, other) == ("b", "e")
        assert begin <= end
    for arrow in arrows.values():
        assert arrow["s"][0] <= arrow["f"][0]
        for ts, lane in arrow.values():
            assert any(begin <= round(1000 * ts) <= end for begin, end in lanes[lane])
    for (_, name), points in counters.items():
        assert points == sorted(points, key=lambda point: point[0])
        if name == "received":
            assert points == sorted(points, key=lambda point: point[1])


def check_nesting(spans: Sequence[tuple[int, int]]) -> None:
    """Of two events of a thread, one holds the other or they do not meet."""
    around: list[int] = []
    for begin, end in sorted(spans, key=lambda span: (span[0], -span[1])):
        while around and around[-1] <= begin:
            around.pop()
        assert not around or end <= around[-1]
        around.append(end)


def test_every_layer_of_every_rank_has_its_parts(answer: Answer) -> None:
    for part in ranks_of(answer):
        [prefill] = spans_of(part, Phase.PREFILL)
        for phase in (Phase.PROJECTIONS, Phase.ATTENTION, Phase.OUTPUT, Phase.MLP):
            spans = spans_of(part, phase)
            assert [span.layer for span in spans] == list(range(LAYERS))
            assert all(prefill.begin_ns <= span.begin_ns for span in spans)
            assert all(span.end_ns <= prefill.end_ns for span in spans)


def test_messages_account_for_all_bytes_of_the_request(answer: Answer) -> None:
    for part, nbytes in zip(ranks_of(answer), answer.output.metrics.bytes_exchanged, strict=True):
        before_report = [message for message in part.messages if message.kind != "report"]
        inside = sum(message.nbytes for message in before_report)
        assert inside == nbytes


def test_passing_blocks_come_from_earlier_ranks_after_they_were_posted(
    answers: dict[str, Answer],
) -> None:
    first, second = ranks_of(answers["apb, sharded"])
    came = [message for message in second.messages if message.kind == "upstream"]
    sent = [message for message in first.messages if message.kind == "upstream"]
    assert [message.layer for message in came] == list(range(LAYERS))
    assert all(message.sources == [0] for message in came)
    assert not any(message.sources for message in sent)
    for theirs, ours in zip(sent, came, strict=True):
        assert theirs.posted_ns <= ours.waited_to_ns


def test_steps_account_for_every_token(answer: Answer) -> None:
    steps = spans_of(ranks_of(answer)[0], Phase.STEP)
    metrics = answer.output.metrics
    emitted = sum(step.detail["tokens"] for step in steps)
    assert emitted == metrics.generated_tokens - 1
    read = sum(step.detail["nodes"] for step in steps)
    assert read / len(steps) == pytest.approx(metrics.tree_nodes)


def test_phases_take_the_time_that_the_result_tells(answer: Answer) -> None:
    part, metrics = ranks_of(answer)[0], answer.output.metrics
    [prefill] = spans_of(part, Phase.PREFILL)
    assert prefill.seconds == pytest.approx(metrics.prefill_s, abs=2e-3)
    decode_s = sum(step.seconds for step in spans_of(part, Phase.STEP))
    assert decode_s == pytest.approx(metrics.decode_s, abs=2e-3)


def test_activities_fill_the_phases_without_overlap(answer: Answer) -> None:
    for part in ranks_of(answer):
        slices = slices_of(part)
        for earlier, later in pairwise(slices):
            assert earlier.end_ns <= later.begin_ns
        [prefill] = spans_of(part, Phase.PREFILL)
        inside = [each.within(prefill.begin_ns, prefill.end_ns).seconds for each in slices]
        assert sum(inside) == pytest.approx(prefill.seconds, abs=1e-9)


def test_attention_does_not_depend_on_where_blocks_are(answers: dict[str, Answer]) -> None:
    found = {}
    for name in ("apb, one rank", "apb, sharded", "apb, rank 0"):
        output = answers[name].output
        assert output.trace is not None
        attended = attended_blocks(output.trace)
        assert attended is not None
        assert attended.blocks == [-1, 0, 1, 2, 3]
        count = len(output.token_ids)
        means, peaks = torch.tensor(attended.means), torch.tensor(attended.peaks)
        assert len(means) >= count
        assert (means <= peaks).all()
        assert (means.sum(dim=1) < 1).all()
        found[name] = torch.stack([means[:count], peaks[:count]])
    one = found.pop("apb, one rank")
    for shares in found.values():
        torch.testing.assert_close(shares, one, atol=1e-5, rtol=1e-4)
