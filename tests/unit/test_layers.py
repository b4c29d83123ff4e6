"""The layer rules of `apb`: who imports whom, and where foreign libraries stay."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]

# A module may import from the rows above its own in this table, and from its own package.
ROWS = [
    {"errors", "paths", "files", "heartbeat", "listening"},
    {"header", "trace"},
    {"layout", "balance", "cost", "comm", "cache", "metrics", "sampling", "prompts", "rotary"}
    | {"log", "output", "progress", "model_config", "launcher_config", "corpus", "arguments"}
    | {"packed", "plot", "supervision", "drain", "json_lines", "revision", "markdown"},
    {"attention"},
    {"compress"},
    {"methods", "speculate"},
    {"clock"},
    {"hf", "report", "table", "agreement", "calibration", "estimate", "hardware"}
    | {"interrupt", "faults", "command"},
    {"engine"},
    {"generation"},
    {"scoring"},
    {"plugins", "config_errors"},
    {"config"},
    {"planning", "requests", "plan_report"},
    {"runner"},
    {"worker", "stores"},
    {"launchers", "rates_bench", "link_bench"},
    {"llm"},
    {"__init__"},
    {"run", "batch", "fetch", "plan", "calibrate", "frequency", "train", "evaluate", "heads"},
]

# A library may be imported only by these files and folders.
HOMES = {
    "torch.distributed": ("apb/comm.py", "apb/stores.py", "apb/worker.py"),
    "transformers": ("apb/hf/",),
    "tokenizers": ("apb/hf/",),
    "hydra": ("apb/config.py", "apb/config_errors.py", "apb/run.py"),
    "omegaconf": ("apb/config.py", "apb/config_errors.py", "apb/run.py"),
    "triton": ("kernels/",),
    "flash_attn": ("apb/attention/flash.py",),
    "flash_attn_interface": ("apb/attention/flash.py",),
    "ray": ("apb/launchers/ray", "apb/batch/ray_rows.py"),
    "pyarrow": ("apb/batch/",),
    "pypdf": ("apb/prompts/document.py",),
    "lm_eval": ("apb/evaluate/lm_eval.py",),
    "matplotlib": ("apb/plot.py",),
}
FREE = {"omegaconf.MISSING"}  # the configuration beside each plug-in declares its mandatory fields

VAGUE_NAMES = {"utils", "common", "helpers"}
MAX_LINES = 300


class Import(NamedTuple):
    line: int
    name: str  # `from a.b import c` is a.b.c
    lazy: bool  # inside a function
    relative: bool = False


def imports(node: ast.AST, lazy: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.Import(names=names):
                yield from (Import(child.lineno, alias.name, lazy) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                for alias in names:
                    yield Import(child.lineno, f"{module}.{alias.name}", lazy, relative=level > 0)
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield Import(child.lineno, "torch.distributed", lazy)
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                yield from imports(child, lazy=True)
                continue
        yield from imports(child, lazy)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def row_of(module: str) -> int | None:
    unit = module.split(".")[1] if "." in module else "__init__"
    return next((idx for idx, row in enumerate(ROWS) if unit in row), None)


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def violations(root: Path) -> list[str]:
    """One sentence per broken rule, each with the file and the line."""
    paths = sorted(path.relative_to(root) for path in root.glob("apb/**/*.py"))
    files = {module_name(path): path for path in paths}
    found: list[str] = []
    graph: dict[str, dict[str, int]] = {}
    for module, path in files.items():
        text = (root / path).read_text()
        found += file_violations(module, path, len(text.splitlines()))
        graph[module] = {}
        for item in imports(ast.parse(text)):
            target = imported_module(item.name, files)
            found += [f"{path}:{item.line}: {rule}" for rule in broken_rules(path, item)]
            if target and not may_import(module, target):
                found.append(f"{path}:{item.line}: {module} may not import {target}; see ROWS")
            if target and not item.lazy:
                graph[module].setdefault(target, item.line)
    return [*found, *cycle_violations(graph, files)]


def file_violations(module: str, path: Path, num_lines: int) -> Iterator[str]:
    if row_of(module) is None:
        yield f"{path}:1: {module} has no row; give it one in ROWS"
    if vague := VAGUE_NAMES.intersection(module.split(".")):
        yield f"{path}:1: the name {vague.pop()} says nothing; name the module after what it does"
    if num_lines > MAX_LINES:
        yield f"{path}:{MAX_LINES + 1}: the file has {num_lines} lines, more than {MAX_LINES}"


def broken_rules(path: Path, item: Import) -> Iterator[str]:
    if item.relative:
        yield "a relative import; write the absolute one"
    for library, homes in HOMES.items():
        at_home = path.as_posix().startswith(homes) or item.name in FREE
        if within(item.name, library) and not at_home:
            yield f"{library} belongs in {' and '.join(homes)}"


def imported_module(name: str, files: dict[str, Path]) -> str | None:
    """The module of `apb` that `name` is or is in; None for anything else."""
    return max((module for module in files if within(name, module)), key=len, default=None)


def may_import(module: str, target: str) -> bool:
    if module.split(".")[:2] == target.split(".")[:2]:
        return True
    row, target_row = row_of(module), row_of(target)
    return row is None or target_row is None or target_row < row


def cycle_violations(graph: dict[str, dict[str, int]], files: dict[str, Path]) -> Iterator[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        chain = error.args[1][::-1]
        line = graph[chain[0]][chain[1]]
        yield f"{files[chain[0]]}:{line}: an import cycle: {' -> '.join(chain)}"


def test_apb_keeps_its_layers() -> None:
    found = violations(ROOT)
    assert not found, "\n".join(found)


def write_tree(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_what_the_rules_allow_is_not_reported(tmp_path: Path) -> None:
    write_tree(
        tmp_path,
        {
            "apb/__init__.py": "def lazy():\n    from apb.engine import Engine\n",
            "apb/engine.py": "import torch\nfrom apb.attention import base\n",
            "apb/attention/__init__.py": "from apb.attention.base import Backend\n",
            "apb/attention/base.py": "from omegaconf import MISSING\nfrom apb.errors import E\n",
            "apb/attention/flash.py": "from apb.attention.base import Backend\nimport flash_attn\n",
            "apb/errors.py": "",
            "apb/hf/model.py": "import transformers.cache_utils\n",
        },
    )
    assert violations(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {"apb/layout.py": "import os\n\nfrom apb.engine import Engine\n", "apb/engine.py": ""},
            "apb/layout.py:3: apb.layout may not import apb.engine; see ROWS",
        ),
        (
            {"apb/cache.py": "def f():\n    import apb.layout\n", "apb/layout.py": ""},
            "apb/cache.py:2: apb.cache may not import apb.layout; see ROWS",
        ),
        (
            {"apb/engine.py": "from apb import LLM\n", "apb/__init__.py": ""},
            "apb/engine.py:1: apb.engine may not import apb; see ROWS",
        ),
        ({"apb/misc.py": ""}, "apb/misc.py:1: apb.misc has no row; give it one in ROWS"),
        (
            {"apb/engine.py": "from transformers import AutoModel\n"},
            "apb/engine.py:1: transformers belongs in apb/hf/",
        ),
        (
            {"apb/cache.py": "from torch import distributed\n"},
            "apb/cache.py:1: torch.distributed belongs in "
            "apb/comm.py and apb/stores.py and apb/worker.py",
        ),
        (
            {"apb/cache.py": "import torch\n\ntorch.distributed.barrier()\n"},
            "apb/cache.py:3: torch.distributed belongs in "
            "apb/comm.py and apb/stores.py and apb/worker.py",
        ),
        (
            {"apb/methods/apb.py": "from omegaconf import OmegaConf\n"},
            "apb/methods/apb.py:1: omegaconf belongs in "
            "apb/config.py and apb/config_errors.py and apb/run.py",
        ),
        (
            {"apb/attention/base.py": "from .flash import Flash\n"},
            "apb/attention/base.py:1: a relative import; write the absolute one",
        ),
        (
            {"apb/hf/utils.py": ""},
            "apb/hf/utils.py:1: the name utils says nothing; name the module after what it does",
        ),
        (
            {"apb/cache.py": "x = 1\n" * 301},
            "apb/cache.py:301: the file has 301 lines, more than 300",
        ),
        (
            {"apb/hf/a.py": "\nimport apb.hf.b\n", "apb/hf/b.py": "from apb.hf.a import x\n"},
            "apb/hf/a.py:2: an import cycle: apb.hf.a -> apb.hf.b -> apb.hf.a",
        ),
    ],
)
def test_each_broken_rule_is_reported(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    write_tree(tmp_path, files)
    assert violations(tmp_path) == [expected]
