"""``python -m apb.run`` as users start it: alone, under torchrun, from any folder, and wrongly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
NEEDLE = ["+model=tiny", "prompt.context_len=900", "decode.max_tokens=6", "decode.ignore_eos=true"]


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=110)


def apb(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(folder, sys.executable, "-m", "apb.run", *arguments)


def test_torchrun_and_local_ranks_give_the_same_answer(tmp_path: Path) -> None:
    torchrun = [*TORCHRUN, "2", "-m", "apb.run", *NEEDLE, "output=torchrun.json", "trace=true"]
    assert run(tmp_path, *torchrun).returncode == 0
    done = apb(tmp_path, *NEEDLE, "launcher=local", "world_size=2", "output=local.json")
    assert done.returncode == 0, done.stderr
    ours, theirs = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("torchrun", "local")
    )
    assert ours["token_ids"] == theirs["token_ids"]
    assert len(ours["token_ids"]) == 6
    assert ours["metrics"]["layout"] == theirs["metrics"]["layout"]
    assert len(ours["metrics"]["layout"]) == 2
    acceptance_length = theirs["metrics"]["acceptance_length"]
    assert f"drafter hybrid, acceptance length {acceptance_length:.2f} tokens" in done.stdout
    check_trace(tmp_path)


def check_trace(folder: Path) -> None:
    """That only the run which was to has left a trace and a page, of both ranks."""
    names = {path.name for path in folder.glob("*.*")}
    assert names == {"local.json", "torchrun.json", "torchrun.trace.json", "torchrun.html"}
    events = json.loads((folder / "torchrun.trace.json").read_text())["traceEvents"]
    for rank in (0, 1):
        phases = {event["name"] for event in events if event["pid"] == rank}
        assert {"load", "plan", "prefill", "attention", "compress"} <= phases
    assert "tiny: apb, 2 ranks" in (folder / "torchrun.html").read_text()


RANKS_APART = """
import os, sys
os.chdir("rank" + os.environ["RANK"])
from apb.run import main
sys.exit(main(sys.argv[1:]))
"""


def test_under_torchrun_rank_0_alone_reads_the_document_and_writes(tmp_path: Path) -> None:
    for rank in range(3):
        (tmp_path / f"rank{rank}").mkdir()
    (tmp_path / "rank0/report.txt").write_text("The miller kept bees. " * 40)
    (tmp_path / "apart.py").write_text(RANKS_APART)
    prompt = ["prompt=file", "prompt.document=report.txt", "prompt.query=Who kept bees?"]
    settings = ["+model=tiny", "decode.max_tokens=6", "decode.ignore_eos=true"]
    done = run(tmp_path, *TORCHRUN, "3", "apart.py", *settings, *prompt)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.rglob("run.log"))) == len(list(tmp_path.rglob(".hydra"))) == 1
    (result,) = (tmp_path / "rank0").rglob("result.json")
    assert json.loads(result.read_text())["metrics"]["generated_tokens"] == 6
    assert done.stdout.count("answer ") == 1
    assert [*(tmp_path / "rank1").iterdir(), *(tmp_path / "rank2").iterdir()] == []


def test_a_file_is_read_and_model_without_plus_works(tmp_path: Path) -> None:
    (tmp_path / "report.txt").write_text("The miller kept bees. " * 40)
    done = apb(
        tmp_path,
        "model=tiny",
        "prompt=file",
        "prompt.document=report.txt",
        "prompt.query=Who kept bees, and why?",
        "decode.max_tokens=2",
        "output=result.json",
    )
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "result.json").read_text())["metrics"]
    assert metrics["context_tokens"] > 40 * 22


def test_cfg_job_prints_the_configuration_and_runs_nothing(tmp_path: Path) -> None:
    done = apb(tmp_path, "+model=tiny", "--cfg", "job")
    assert done.returncode == 0
    assert "passing_len: 0.125" in done.stdout
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "no model given: add +model=NAME with one of"),
        (["model=tiny", "method.anchr_len=3"], "unknown setting method.anchr_len"),
        (
            ["model=tiny", "prompt=file", "prompt.document=no.txt", "prompt.query=x"],
            "no.txt does not exist",
        ),
        (["model=tiny", "output=nowhere/x.json"], "output=nowhere/x.json"),
        (["model=tiny", "output=x.html", "trace=true"], "output=x.html"),
        (["model=tiny", "output=x.json", "hydra.run.dir=/dev/null/x"], "set hydra.run.dir to one"),
        (["model=tiny", "bogus=1", "--cfg=job"], "unknown setting bogus"),
        (["model=custom", "model.path=."], "has no config.json"),
        (
            ["model=tiny", "num_blocks=4", "prompt.context_len=900", "method.anchor_len=5000"],
            "method.anchor_len=5000",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    done = apb(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("apb: ")
    assert sentence in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
