"""The code in the documents runs, with the tiny model in place of those that need a download."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.forked_ranks import start_forked_rank
from pages import PAGES, Block, Command, blocks, commands

RUN = [block for page in PAGES for block in blocks(page) if block.info in ("sh", "python")]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """What the documents suppose to be there, and ranks that come up in a second."""
    document = "The mill stood by the river. It was signed by the miller. " * 30
    (tmp_path / "report.txt").write_text(document)
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "1.txt").write_text(document)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("apb.launchers.processes.start_rank", start_forked_rank)
    monkeypatch.setattr(sys, "argv", ["apb"])
    log = logging.getLogger("apb")
    handlers, level, propagates = log.handlers[:], log.level, log.propagate
    yield tmp_path
    for handler in [it for it in log.handlers if it not in handlers]:
        log.removeHandler(handler)
        handler.close()
    log.level, log.propagate = level, propagates


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.where)
def test_code_runs(block: Block, folder: Path) -> None:
    block = block._replace(text=block.text.replace("smollm2-135m", "tiny"))
    if block.info == "python":
        exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})
        return
    found = list(commands(block))
    assert found, "a block without a command of apb is `sh no-run`"
    for command in found:
        assert run(command) == 0, command
    for name in (word[7:] for command in found for word in command.words if "output=" in word):
        assert (folder / name).stat().st_size > 0


def run(command: Command) -> int:
    """The exit code. What torchrun would start, local ranks do as well."""
    words = command.words
    if command.world_size is not None:
        words = [*words, f"world_size={command.world_size}"]
    code: int = importlib.import_module(command.file).main(words)
    return code
