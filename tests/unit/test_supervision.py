"""Who is to blame for a stall or an end, and who may start again; with a made-up clock."""

from __future__ import annotations

import pytest

from apb.errors import EngineDeadError, InputError, PeerLostError, RankFailure
from apb.heartbeat import Beat, Stage
from apb.supervision import (
    Blame,
    Report,
    RestartBudget,
    Stall,
    SupervisionConfig,
    Watcher,
    first_cause,
)

CONFIG = SupervisionConfig(layer_s=2.0, step_s=3.0, exchange_s=5.0, load_s=50.0, heartbeat_s=4.0)


def working(layer: int, marks: int = 0, *, stage: Stage = Stage.PREFILL, request: int = 1) -> Beat:
    return Beat(marks=marks, request=request, stage=stage, layer=layer)


def waiting(layer: int, marks: int = 0, *, step: int = 1) -> Beat:
    beat = Beat(marks=marks, request=1, stage=Stage.PREFILL, step=step, layer=layer)
    return beat._replace(waiting=True)


def stall_after(seconds: float, *beats: Beat, request: int = 1) -> Stall | None:
    """What is seen if the same heartbeats come for so long, looked at four times a second."""
    watcher, found = Watcher(CONFIG), None
    for tick in range(int(seconds * 4) + 1):
        found = found or watcher.observe(beats, 100 + tick / 4, request=request)
    return found


def test_a_working_rank_is_blamed_once_its_budget_is_spent_and_not_before() -> None:
    beats = [waiting(4), waiting(4), working(3), waiting(4)]
    assert stall_after(2.0, *beats) is None
    stall = stall_after(2.25, *beats)
    assert stall is not None
    assert (stall.rank, stall.beat.place) == (2, "prefill, layer 3")
    assert stall.limit == "supervision.layer_s=2"
    assert "no progress for 2.2 s" in stall.failure("here").sentence


def test_of_several_late_ranks_the_one_furthest_behind_is_blamed() -> None:
    stall = stall_after(3, working(5), working(2), working(4), waiting(6))
    assert stall is not None
    assert stall.rank == 1


def test_waiting_ranks_are_not_blamed_while_anyone_works() -> None:
    beats = [waiting(4), working(0, stage=Stage.LOAD)]
    assert stall_after(49, *beats) is None
    stall = stall_after(51, *beats)
    assert stall is not None
    assert stall.rank == 1


def test_progress_of_the_marks_alone_is_progress() -> None:
    watcher = Watcher(CONFIG)
    for tick in range(400):
        beats = [waiting(1), working(0, marks=tick // 15)]
        assert watcher.observe(beats, tick / 10, request=1) is None


@pytest.mark.parametrize(
    ("layers", "culprit"),
    [
        ((3, 3, 3), None),  # nobody is elsewhere: the network fails
        ((3, 4, 3), 1),  # one has left out a message and waits for the next
        ((4, 3, 4), 1),  # one has not got what the others have
        ((3, 4), 1),  # nobody passes a collective that another has not begun
    ],
)
def test_where_all_wait_the_odd_one_out_is_blamed(
    layers: tuple[int, ...], culprit: int | None
) -> None:
    beats = [waiting(layer) for layer in layers]
    assert stall_after(5, *beats) is None
    stall = stall_after(5.5, *beats)
    assert stall is not None
    assert stall.rank == culprit
    assert stall.limit == "supervision.exchange_s=5"


def test_a_predicted_layer_grants_more_than_the_least_budget() -> None:
    beat = working(1)._replace(expected_ms=1500)
    assert stall_after(14, beat) is None
    assert stall_after(16, beat) is not None


def test_an_idle_rank_counts_only_while_there_is_a_request_that_it_has_not_taken() -> None:
    done = working(0, stage=Stage.IDLE)
    assert stall_after(60, done, done) is None
    stall = stall_after(6, waiting(0)._replace(request=2), done, request=2)
    assert stall is not None
    assert (stall.rank, stall.limit) == (1, "supervision.heartbeat_s=4")


def test_without_a_driver_a_rank_may_take_its_time_between_requests() -> None:
    beats = [waiting(0)._replace(request=2), working(0, stage=Stage.IDLE)]
    assert stall_after(60, *beats, request=0) is None


def test_a_rank_that_has_left_is_neither_blamed_nor_waited_for() -> None:
    assert stall_after(60, working(0, stage=Stage.LEFT), working(0, stage=Stage.IDLE)) is None


def test_a_break_in_watching_is_not_held_against_the_ranks() -> None:
    watcher, beats = Watcher(CONFIG), [working(3)]
    for begin in (0.0, 500.0):  # stopped, or asleep with the machine
        assert watcher.observe(beats, begin) is None
        assert watcher.observe(beats, begin + 1.9) is None
    assert watcher.observe(beats, 502.1) is not None
    watcher.forget()
    assert watcher.observe(beats, 503.0) is None
    assert watcher.observe(beats, 505.1) is not None


@pytest.mark.parametrize(
    ("stage", "limit"), [(Stage.PREFILL, "heartbeat_s=4"), (Stage.IDLE, "heartbeat_s=4")]
)
def test_a_rank_that_is_not_heard_of_is_blamed_whatever_it_was_at(stage: Stage, limit: str) -> None:
    watcher, found = Watcher(SupervisionConfig(heartbeat_s=4.0)), None
    for tick in range(20):
        beats = [working(3, marks=tick), working(0, stage=stage)]
        found = found or watcher.observe(beats, tick / 4, unheard={1} if tick else ())
    assert found is not None
    assert (found.rank, found.limit) == (1, f"supervision.{limit}")
    assert found.failure("there").sentence == (
        f"rank 1 on there has not been heard of for 4.2 s, more than supervision.{limit} allows "
        f"(last heard of in {beats[1].place})"
    )


def test_a_rank_that_starts_may_be_silent_for_longer() -> None:
    watcher = Watcher(SupervisionConfig(heartbeat_s=4.0, start_s=60.0))
    meets = Beat(marks=1, waiting=True)
    for tick in range(60):
        assert watcher.observe([meets, Beat()], tick, unheard={1}) is None
    stall = watcher.observe([meets, Beat()], 61, unheard={1})
    assert stall is not None
    assert (stall.rank, stall.limit) == (1, "supervision.start_s=60")


def test_a_rank_that_others_have_met_does_not_start_though_nothing_else_was_heard_of_it() -> None:
    watcher = Watcher(SupervisionConfig(heartbeat_s=4.0, start_s=60.0))
    for tick in range(5):
        assert watcher.observe([working(3, marks=tick), Beat()], tick, unheard={1}) is None
    stall = watcher.observe([working(3, marks=99), Beat()], 5, unheard={1})
    assert stall is not None
    assert (stall.rank, stall.limit) == (1, "supervision.heartbeat_s=4")


@pytest.mark.parametrize(
    "last_heard", [working(1), working(0, stage=Stage.IDLE, request=0), Beat()]
)
def test_a_silent_rank_that_all_others_wait_for_has_the_time_of_an_exchange(
    last_heard: Beat,
) -> None:
    """It may be stopped before its heartbeat tells what it is at."""
    config = SupervisionConfig(layer_s=50.0, heartbeat_s=50.0, exchange_s=5.0)
    watcher, answering = Watcher(config), Watcher(config)
    beats = [waiting(2), last_heard, waiting(2)]
    for tick in range(5):
        assert watcher.observe(beats, tick, request=1, unheard={1}) is None
    for tick in range(20):
        assert answering.observe(beats, tick, request=1) is None
    stall = watcher.observe(beats, 5.5, request=1, unheard={1})
    assert stall is not None
    assert (stall.rank, stall.limit, stall.is_silent) == (1, "supervision.exchange_s=5", True)


def report(blame: Blame, rank: int, at_s: float) -> Report:
    return Report(blame, at_s, RankFailure(rank, "here", "prefill, layer 1", "failed"))


def test_the_first_cause_is_who_fell_silent_then_who_failed_then_a_victim() -> None:
    victims = [report(Blame.VICTIM, 0, 1.0), report(Blame.VICTIM, 3, 1.1)]
    accused, raised = report(Blame.ACCUSED, 4, 1.2), report(Blame.RAISED, 2, 1.5)
    murdered = report(Blame.MURDERED, 1, 2.0)
    assert first_cause(victims).rank == 0
    assert first_cause([*victims, accused]).rank == 4
    assert first_cause([*victims, accused, raised]).rank == 2
    assert first_cause([*victims, raised, report(Blame.RAISED, 5, 1.4)]).rank == 5
    assert first_cause([*victims, accused, raised, murdered]).rank == 1


@pytest.mark.parametrize(
    ("error", "blame", "rank", "words"),
    [
        (PeerLostError("rank 2 lost another rank"), Blame.VICTIM, 2, "lost another rank"),
        (ValueError("odd\nand more"), Blame.RAISED, 2, "failed: ValueError: odd"),
        (MemoryError(), Blame.RAISED, 2, "ran out of memory: MemoryError"),
        (
            EngineDeadError("x", RankFailure(1, "", "layer 3 of step 1", "sent the wrong message")),
            Blame.ACCUSED,
            1,
            "sent the wrong message",
        ),
    ],
)
def test_an_error_says_whom_to_blame(error: Exception, blame: Blame, rank: int, words: str) -> None:
    try:
        raise error
    except Exception as caught:
        found = Report.of(caught, rank=2, host="here", place="prefill, layer 3", at_s=1.0)
    assert (found.blame, found.failure.rank, found.failure.host) == (blame, rank, "here")
    assert found.failure.reason.endswith(words)
    assert ("Traceback" in found.failure.stack) == (blame is Blame.RAISED)
    blame_value, at_s, failure = found
    assert Report.from_json([int(blame_value), at_s, list(failure)]) == found


def test_restarts_are_granted_within_a_sliding_window() -> None:
    budget = RestartBudget(SupervisionConfig(restarts=2, restart_window_s=10.0))
    granted = [budget.spend(now) for now in (0.0, 6.0, 9.0, 10.0, 15.0, 16.0)]
    assert granted == [True, True, False, True, False, True]


def test_wrong_budgets_are_one_sentence() -> None:
    with pytest.raises(InputError, match=r"supervision.layer_s=0 must be 0.1 to 1e9"):
        SupervisionConfig(layer_s=0)
    with pytest.raises(InputError, match=r"supervision.restarts=-1 must be 0 to 1e9"):
        SupervisionConfig(restarts=-1)
