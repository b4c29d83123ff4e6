"""Guarantees of audited requests: the result says what was found, and too much is read again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apb.comm import Communicator
from apb.config import compose_config
from apb.errors import InputError
from apb.output import RequestOutput
from apb.runner import RequestRunner

DOCUMENT = "The crane was built by Ada in 1911. " * 12


def ask(*overrides: str) -> RequestOutput:
    config = compose_config(["model=tiny", "dtype=float32", "num_blocks=4", *overrides])
    runner = RequestRunner(config, Communicator(0, 1, torch.device("cpu")))
    params: dict[str, Any] = {"max_tokens": 8}
    arguments = {"document": DOCUMENT, "question": "Who built it?", "params": params}
    *_, last = runner.handle("ask", arguments)
    return RequestOutput.from_json(last["result"])


def test_an_audited_answer_is_the_same_answer_with_findings() -> None:
    plain, audited = ask(), ask("audit=true")
    assert audited.token_ids == plain.token_ids
    assert plain.metrics.audit == []
    assert [finding.layer for finding in audited.metrics.audit] == [0, 1]
    assert all(0 < finding.output_error < 1 for finding in audited.metrics.audit)


def test_an_error_above_the_limit_is_answered_exactly_and_says_so() -> None:
    exact = ask("method=full", "num_blocks=null")
    found = ask("audit.max_error=1e-3")
    assert found.token_ids == exact.token_ids
    assert found.metrics.method == "zigzag"
    (note,) = found.metrics.notes
    assert "audit.max_error=0.001" in note
    assert "read again with zigzag" in note


def test_an_error_below_the_limit_is_left_alone() -> None:
    found = ask("audit.max_error=1.0")
    assert found.metrics.method == "apb"
    assert not any("audit" in note for note in found.metrics.notes)
    assert found.metrics.audit


@pytest.mark.parametrize("override", ["audit.rows=0", "audit.heads=-1", "audit.max_error=-0.5"])
def test_wrong_settings_are_refused(override: str) -> None:
    with pytest.raises(InputError, match=override.partition("=")[0]):
        compose_config(["model=tiny", override])
