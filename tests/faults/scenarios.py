"""The table of faults: what happens to which rank where, and what everybody else must see."""

from __future__ import annotations

from typing import NamedTuple

WORLD_SIZE = 3
BUDGET_S = 2.0
"""Of a layer, a token and an exchange; for loading, which takes longer here, see `LOAD_S`."""
LOAD_S = 8.0
NAMED_WITHIN_S = 5.0
"""After a kill or an exception, or after the budget of a stage that hangs."""
OVERRIDES = [
    "model.architecture.num_hidden_layers=4",
    *("device=cpu", "method.min_block_len=16", "decode.placement=sharded", "drafter=none"),
    *(f"supervision.{name}_s={BUDGET_S}" for name in ("layer", "step", "exchange")),
    *(f"supervision.load_s={LOAD_S}", "supervision.restarts=100"),
]

KILLED, SILENT, STUCK = "killed by SIGKILL", "ended without a word", "made no progress"
RAISED, STOPPED = "RuntimeError: injected", "was stopped by a signal"
SPOILED = "sent or missed the wrong message"


class Scenario(NamedTuple):
    """A fault of one rank.

    The gang is lost, unless `ends` says that only the request fails or that it is answered.
    """

    kind: str
    stage: str
    rank: int = 1
    ends: str = "gang"
    place: str | None = None
    """What the failure's place begins with; by default the stage."""
    words: str = ""
    """Found in the reason."""
    layer: int | None = None
    """Or token; None is 1, and of exchanges the first one."""

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.stage}" + ("" if self.layer is None else f"-{self.layer}")

    @property
    def budget_s(self) -> float:
        """How long the fault may go unnoticed before `NAMED_WITHIN_S` begins."""
        if self.words not in (STUCK, STOPPED):
            return 0.0
        return LOAD_S if self.stage == "load" else BUDGET_S

    def text(self, *, request: int, gang: int = 0) -> str:
        """For `APB_FAULTS`; requests are counted by each gang."""
        fields = [f"rank={self.rank}", f"stage={self.stage}", f"kind={self.kind}"]
        if self.layer is not None or self.stage in ("prefill", "decode"):
            fields.append(f"layer={1 if self.layer is None else self.layer}")
        fields += [f"request={request}", f"gang={gang}"]
        if self.kind == "slow":
            fields.append("seconds=0.3")
        return ",".join(fields)


SCENARIOS = [
    Scenario("kill", "load", 2, words=KILLED),
    Scenario("raise", "load", 1, words=RAISED),
    Scenario("hang", "load", 0, words=STUCK),
    Scenario("kill", "prefill", 2, words=KILLED),
    Scenario("exit0", "prefill", 1, words=SILENT),
    Scenario("raise", "prefill", 0, words=RAISED),
    Scenario("oom", "prefill", 2, words="ran out of memory: OutOfMemoryError"),
    Scenario("hang", "prefill", 1, words=STUCK),
    Scenario("stop", "prefill", 2, words=STOPPED),
    Scenario("slow", "prefill", 1, ends="answer"),
    Scenario("kill", "exchange", 0, place="prefill", words=KILLED),
    Scenario("raise", "exchange", 2, place="prefill", words=RAISED),
    Scenario("hang", "exchange", 1, place="prefill", words=STUCK),
    Scenario("nan", "exchange", 0, ends="request", words="are not finite.*on rank 1 first"),
    Scenario("corrupt", "exchange", 0, place="layer", words=SPOILED),
    Scenario("skip", "exchange", 1, place="layer", words=SPOILED),
    # The last exchange of a pass: nothing follows that could be mistaken for it.
    Scenario("skip", "exchange", 1, layer=2, place="prefill", words=STUCK),
    Scenario("kill", "decode", 1, words=KILLED),
    Scenario("exit0", "decode", 2, words=SILENT),
    Scenario("raise", "decode", 0, words=RAISED),
    Scenario("hang", "decode", 2, words=STUCK),
    Scenario("stop", "decode", 0, words=STOPPED),
]
FAST = {"kill-prefill", "hang-prefill", "nan-exchange"}
"""Run with every test run; the others by `make faults`."""
TORCHRUN = {
    *("raise-load", "kill-prefill", "exit0-prefill", "raise-prefill", "hang-prefill"),
    *("stop-prefill", "corrupt-exchange", "exit0-decode", "hang-decode"),
}
RAY = [
    *("kill-load", "raise-prefill", "hang-prefill", "stop-prefill", "nan-exchange"),
    *("corrupt-exchange", "kill-exchange", "exit0-decode", "hang-decode"),
]
