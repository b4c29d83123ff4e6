"""`python -m apb.evaluate` on real ranks: resumed runs, one gang for all methods, comparisons."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

from apb import LLM
from apb.evaluate.__main__ import main
from apb.evaluate.evaluation import evaluate
from apb.evaluate.settings import parse_settings
from apb.revision import revision

WORDS = [
    *("+model=tiny", "tasks=niah_single_1,prose", "methods=[full,star,apb]"),
    *("lengths=2048", "samples=2", "seed=3"),
]
TIMES = ("prefill_s", "ttft_s", "seconds")


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [{key: row[key] for key in row if key not in TIMES} for row in found]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    assert main([*WORDS, f"output={folder}"]) == 0
    return folder


def test_every_sample_has_a_row_of_every_method(done: Path) -> None:
    found = {(row["task"], row["sample"], row["method"]) for row in rows(done)}
    assert len(found) == len(rows(done)) == 2 * 2 * 3
    digests = {(row["task"], row["sample"], row["digest"]) for row in rows(done)}
    assert len(digests) == 4, "the same documents for all methods"


def test_rows_and_report_say_what_they_come_from(done: Path) -> None:
    source = revision(Path(__file__).parents[2], "apb", "conf", "kernels")
    assert {row["source"] for row in rows(done)} == {source}
    report = (done / "report.md").read_text()
    command = shlex.join(["python", "-m", "apb.evaluate", *WORDS, f"output={done}"])
    assert f"* command: `{command}`" in report
    assert "* 12 rows took 0:" in report
    assert f"* by apb at commit {source} (12 rows)" in report
    assert "* ran in float32 on cpu" in report or "* ran in bfloat16 on cpu" in report
    assert "sdpa (6 rows)" in report, "of prose nothing is generated"


def test_full_attention_does_not_diverge_from_itself_and_the_others_do(done: Path) -> None:
    kl = {(row["method"], row["sample"]): row["kl"] for row in rows(done) if row["task"] == "prose"}
    for index in range(2):
        assert abs(kl["full", index]) < 1e-6
        assert kl["star", index] > 10 * abs(kl["full", index])
        assert kl["apb", index] > 10 * abs(kl["full", index])


def test_a_resumed_evaluation_equals_an_uninterrupted_one(done: Path, tmp_path: Path) -> None:
    shutil.copytree(done, folder := tmp_path / "resumed")
    lines = (folder / "samples.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "samples.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:40])
    assert main([*WORDS, f"output={folder}"]) == 0
    assert rows(folder) == rows(done)


def test_what_is_complete_is_only_reported_again(
    done: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LLM, "from_overrides", None)
    first = (done / "report.md").read_text()
    assert main([*WORDS, f"output={done}"]) == 0
    shown = capsys.readouterr().out
    assert shown == first == (done / "report.md").read_text()
    for part in ("| `star` |", "## Against `full`", "## Real prose", "niah_single_1 | 2048"):
        assert part in shown
    summary = json.loads((done / "summary.json").read_text())
    overall = [
        entry
        for entry in summary["summary"]
        if entry["quantity"] == "score" and entry["task"] is entry["length"] is None
    ]
    assert [entry["method"] for entry in overall] == ["full", "star", "apb"]
    assert [entry["value"]["samples"] for entry in overall] == [2, 2, 2]


def test_one_gang_gives_each_method_the_rows_of_a_gang_of_its_own(
    done: Path, tmp_path: Path
) -> None:
    words = [word for word in WORDS if not word.startswith("methods")]
    alone = parse_settings([*words, "methods=apb", f"output={tmp_path}"])
    evaluate(alone)
    assert rows(tmp_path) == [row for row in rows(done) if row["method"] == "apb"]


def test_another_evaluation_can_be_the_baseline(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done, other := tmp_path / "other")
    words = [*WORDS, f"output={done}", f"baseline={other}"]
    assert main(words) == 0
    assert "## Against `other: full`" in capsys.readouterr().out
    text = (other / "samples.jsonl").read_text()
    (other / "samples.jsonl").write_text(text.replace(rows(done)[0]["digest"], "0"))
    assert main(words) == 2
    assert f"baseline={other} has another document than output={done}" in capsys.readouterr().err


@pytest.mark.parametrize("origin", ["output", "baseline"])
def test_another_document_is_noticed_before_it_is_read(
    done: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    origin: str,
) -> None:
    monkeypatch.setattr(LLM, "ask", None)
    shutil.copytree(done, folder := tmp_path / "folder")
    stale = next(row for row in rows(folder) if row["method"] == "full")
    (folder / "samples.jsonl").write_text(json.dumps({**stale, "digest": "0"}) + "\n")
    assert main([*WORDS, f"output={tmp_path / 'new'}", f"{origin}={folder}"]) == 2
    assert f"{origin}={folder} has another document than this evaluation" in capsys.readouterr().err


def test_an_evaluation_does_not_go_on_under_other_settings(
    done: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows(done)
    assert main([*WORDS, "dtype=bfloat16", f"output={done}"]) == 2
    assert "holds an evaluation with other settings" in capsys.readouterr().err
    assert rows(done) == before
