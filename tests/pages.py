"""The repository's documents as tests read them: fenced blocks, and the commands in them."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md")))
_FENCE = re.compile(r"^( *)```([^`\n]+)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_ASSIGNMENT = re.compile(r"[A-Z_]+=")
_STARTED = {"torchrun": "-m", "python": "-m"}


class Block(NamedTuple):
    """A fenced block: where it is, what stands behind its fence, and its lines."""

    page: Path
    line: int
    info: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """``python -m MODULE WORDS``, under torchrun or not."""

    module: str
    words: list[str]
    world_size: int | None = None
    """That torchrun is told."""

    @property
    def file(self) -> str:
        """The module that runs: a package's is its `__main__`."""
        is_package = (ROOT / self.module.replace(".", "/")).is_dir()
        return f"{self.module}.__main__" if is_package else self.module


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text()
    for found in _FENCE.finditer(text):
        _, info, body = found.groups()
        line = text.count("\n", 0, found.start()) + 1
        yield Block(page, line, info, textwrap.dedent(body))


def commands(block: Block) -> Iterator[Command]:
    """The commands of apb in a block of shell; in a transcript, those behind a prompt."""
    text = block.text.replace("\\\n", " ")
    lines = text.splitlines()
    if block.info == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and _ASSIGNMENT.match(words[0]):
            words.pop(0)
        if not words or words[0] not in _STARTED or "-m" not in words:
            continue
        at = words.index("-m")
        own, module, rest = words[1:at], words[at + 1], words[at + 2 :]
        size = int(own[own.index("--nproc-per-node") + 1]) if "--nproc-per-node" in own else None
        yield Command(module, rest, size)


def code_spans(text: str) -> list[str]:
    """What stands between single backticks."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def table_rows(page: Path, heading: str) -> list[list[str]]:
    """The cells of the first table below a heading, without the table's own heading."""
    lines = iter(page.read_text().splitlines())
    assert any(line.lstrip("#") == f" {heading}" for line in lines), f"{page}: no {heading}"
    below = dropwhile(lambda line: not line.startswith("|"), lines)
    table = [*takewhile(lambda line: line.startswith("|"), below)]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in table[2:]]
