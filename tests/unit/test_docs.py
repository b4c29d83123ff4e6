"""The documents: they build without a warning, and what they say can be typed exists.

What their code does is tested in tests/end_to_end/test_docs.py.
"""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sphinx.cmd.build import build_main

from apb.config import compose_config
from apb.plugins import PLUGINS
from blocks import draw_block
from pages import PAGES, ROOT, Block, blocks, code_spans, commands, table_rows

DOCS = ROOT / "docs"
LANGUAGES = ("sh", "sh no-run", "console", "python", "text", "yaml", "bibtex", "{eval-rst}")
"""`sh` and `python` run; of `sh no-run` and of transcripts (`console`) settings are composed."""
SETTING = re.compile(r"\+?[a-z][\w./]*=.")
BLOCKS = [block for page in PAGES for block in blocks(page)]


def check_settings(words: Sequence[str], *, of: str = "apb.run") -> None:
    """Raises unless each word is an option that a module documents, or a setting of apb."""
    options = re.findall(r"(\w+)=", importlib.import_module(of).__doc__ or "")
    keyed = [(word.lstrip("+").partition("=")[0], word) for word in words]
    settings = [word for key, word in keyed if key == "model" or key not in options]
    compose_config(["model=tiny" if word.endswith("model=NAME") else word for word in settings])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_the_site_builds_without_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["-qW", "--keep-going", "-c", f"{DOCS}", f"{ROOT}", f"{tmp_path}"]
    assert build_main(arguments) == 0, capsys.readouterr().err
    for page in PAGES:
        assert (tmp_path / page.relative_to(ROOT)).with_suffix(".html").exists(), page.name


def test_every_block_says_what_it_is() -> None:
    assert [block.where for block in BLOCKS if block.info not in LANGUAGES] == []


SHELL = [block for block in BLOCKS if block.info in ("sh", "sh no-run", "console")]


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.where)
def test_commands_have_settings_that_compose(block: Block) -> None:
    for command in commands(block):
        words = command.words
        if command.module == "apb.evaluate.lm_eval":
            words = words[words.index("--model_args") + 1].split(",")
            check_settings(words)
        elif command.module.startswith("apb."):
            check_settings([word for word in words if "=" in word], of=command.file)
    targets = re.findall(r"^make (\w+)", block.text, re.MULTILINE)
    assert set(targets) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))


def test_each_line_of_the_table_of_settings_is_a_change_to_the_command_above_it() -> None:
    page = DOCS / "quickstart.md"
    (base,) = (c for b in blocks(page) for c in commands(b) if "+model=tiny" in c.words)
    rows = table_rows(page, "Swap a part")
    assert len(rows) > 15
    for change, *_ in rows:
        (given,) = code_spans(change)
        check_settings([*base.words, *given.split()])


def test_settings_of_ray_compose() -> None:
    rows = table_rows(DOCS / "clusters.md", "Ray")
    for (setting,) in (code_spans(row[0]) for row in rows):
        check_settings(["model=tiny", "launcher=ray", setting])


def test_launch_commands_name_files_and_settings_that_exist() -> None:
    for _, cell in table_rows(DOCS / "clusters.md", "On a cluster"):
        for span in code_spans(cell):
            words = shlex.split(span)
            settings = [word for word in words if SETTING.match(word)]
            if settings:
                check_settings(settings)
            for word in words:
                assert not word.startswith("launch/") or (ROOT / word).is_file()


@pytest.mark.parametrize(
    ("page", "heading", "group", "unlisted"),
    [
        ("methods", "Methods", "method", ()),
        ("compressors", "Compressors", "method/compressor", ()),
        ("speculation", "Drafters", "drafter", ("none",)),
    ],
)
def test_a_page_lists_every_plug_in_of_its_kind(
    page: str, heading: str, group: str, unlisted: tuple[str, ...]
) -> None:
    named = [code_spans(row[0])[0] for row in table_rows(DOCS / f"{page}.md", heading)]
    assert sorted([*named, *unlisted]) == sorted(PLUGINS[group])


def test_the_page_on_architecture_names_every_package() -> None:
    named = code_spans((DOCS / "architecture.md").read_text())
    packages = [path.name for path in (ROOT / "apb").iterdir() if (path / "__init__.py").exists()]
    assert [name for name in packages if f"{name}/" not in named] == []


def test_the_plug_in_of_the_page_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {block.info: block.text for block in blocks(DOCS / "plugins.md")}
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(found["python"], names)
    shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (tmp_path / "conf/method/compressor/vnorm.yaml").write_text(found["yaml"])
    monkeypatch.setattr("apb.config.config_dir", lambda: tmp_path / "conf")
    monkeypatch.setitem(PLUGINS["method/compressor"], "vnorm", names["VnormConfig"])
    config = compose_config(["model=tiny", "method/compressor=vnorm"])
    block = draw_block(40)
    scores_KS = config.method.compressor.build(seed=0).score(block)  # type: ignore[attr-defined]
    assert scores_KS.shape == block.v_KSD.shape[:2]
    row = block.v_KSD[1, 7]
    assert scores_KS[1, 7] == pytest.approx(float(row.square().sum().sqrt()))
