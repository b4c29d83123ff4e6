"""Rules of the source that SECURITY.md states: no code from data."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNPICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
OBJECT_COLLECTIVES = ("_object", "_object_list")  # of torch.distributed: they unpickle


def dangers(text: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name in UNPICKLERS)
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in UNPICKLERS:
                yield module
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield name
            case ast.Call(func=ast.Attribute(value=ast.Name(id=owner), attr=name), keywords=given):
                called = f"{owner}.{name}"
                values = {one.arg: getattr(one.value, "value", None) for one in given}
                if called == "torch.load" and values.get("weights_only") is not True:
                    yield called
                if called == "yaml.load" or (owner == "dist" and name.endswith(OBJECT_COLLECTIVES)):
                    yield called
                if name.startswith("from_") and values.get("trust_remote_code"):
                    yield f"{called} with remote code"
                if values.get("shell"):
                    yield f"{called} in a shell"


@pytest.mark.parametrize("folder", ["apb", "kernels", "launch"])
def test_data_never_becomes_code(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    found = [f"{path}: {what}" for path in files for what in dangers(path.read_text())]
    assert not found


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "dist.all_gather_object(values, value)",
        "dist.broadcast_object_list(values)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_each_danger_is_seen(line: str) -> None:
    assert list(dangers(line))


def test_what_is_safe_is_let_through() -> None:
    safe = "torch.load(path, weights_only=True)\nmodel.eval()\nyaml.safe_load(text)\n"
    assert not list(dangers(safe + "AutoModel.from_pretrained(path, trust_remote_code=False)"))
