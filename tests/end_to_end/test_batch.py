"""``python -m apb.batch`` on real ranks: every row ends as an answer or an error, once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from apb import LLM, SamplingParams
from apb.batch.__main__ import main

QUESTION = "Who kept bees?"
SETTINGS = ["+model=tiny", "world_size=1", "decode.max_tokens=4", "decode.ignore_eos=true"]
COMMAND = [sys.executable, "-m", "apb.batch", *SETTINGS, f"question={QUESTION}"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
pytestmark = pytest.mark.timeout(300)  # gangs start one after another


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    folder.mkdir()
    for idx in range(4):
        (folder / f"{idx}.txt").write_text(f"Miller number {idx} kept bees. " * 30)
    return folder


def answers(output: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line for line in lines}


def test_a_failed_row_stops_nothing_and_is_tried_again(
    documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (documents / "1.txt").write_bytes(b"\xff\xfe")
    output = tmp_path / "out.jsonl"
    command = [*SETTINGS, f"input={documents}", f"output={output}", f"question={QUESTION}"]
    assert main(command) == 1
    before = answers(output)
    assert [row for row in before if before[row]["error"]] == ["1.txt"]
    assert "not UTF-8" in before["1.txt"]["error"]
    with LLM("tiny", world_size=1) as llm:
        document = (documents / "0.txt").read_text()
        out = llm.ask(document, QUESTION, SamplingParams(max_tokens=4, ignore_eos=True))
    assert before["0.txt"]["text"] == out.text
    assert before["0.txt"]["finish_reason"] == "length"
    (documents / "1.txt").write_text("A miller. " * 30)
    assert main(command) == 0
    after = answers(output)
    assert list(after) == sorted(after)
    assert after["1.txt"]["error"] is None
    assert {**after, "1.txt": None} == {**before, "1.txt": None}  # times included: not run again


def test_a_killed_batch_goes_on_where_it_was(documents: Path, tmp_path: Path) -> None:
    for idx in range(4, 200):
        (documents / f"{idx}.txt").write_text(f"Miller number {idx} kept bees. " * 30)
    output = tmp_path / "out.jsonl"
    batch = subprocess.Popen([*COMMAND, f"input={documents}", f"output={output}"])
    give_up = time.monotonic() + 60
    while not output.exists() or output.read_bytes().count(b"\n") < 3:
        assert time.monotonic() < give_up
        assert batch.poll() is None
        time.sleep(0.05)
    batch.kill()
    batch.wait()
    before = answers(output) if output.read_bytes().endswith(b"\n") else {}
    assert len(before) < 200
    for idx in range(8, 200):
        (documents / f"{idx}.txt").unlink()
    done = subprocess.run([*COMMAND, f"input={documents}", f"output={output}"], timeout=110)
    assert done.returncode == 0
    after = answers(output)
    assert {f"{idx}.txt" for idx in range(8)} <= after.keys()
    assert {row: after[row] for row in before} == before


def test_torchrun_ranks_answer_the_same_rows_and_rank_0_alone_reads(
    documents: Path, tmp_path: Path
) -> None:
    (documents / "2.txt").write_text("")  # of this row the other rank hears nothing
    shared = [f"input={documents}", f"question={QUESTION}", *SETTINGS[2:], "+model=tiny"]
    torchrun = subprocess.run(
        [*TORCHRUN, "-m", "apb.batch", *shared, f"output={tmp_path / 'torchrun.jsonl'}"],
        capture_output=True,
        timeout=110,
    )
    assert torchrun.returncode == 1
    assert main([*shared, "world_size=2", f"output={tmp_path / 'local.jsonl'}"]) == 1
    ours, theirs = (answers(tmp_path / f"{name}.jsonl") for name in ("torchrun", "local"))
    assert {row: ours[row]["text"] for row in ours} == {row: theirs[row]["text"] for row in theirs}
    assert "holds no text" in ours["2.txt"]["error"]
    assert len(ours) == 4
