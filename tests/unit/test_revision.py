"""Guarantees of the revision that results carry."""

from __future__ import annotations

import subprocess
from pathlib import Path

from apb.revision import UNKNOWN, revision


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    command = ["git", *identity, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_revision_is_the_commit_and_what_it_lacks_of_the_paths(tmp_path: Path) -> None:
    for name in ("own", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text("1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "own")
    git(tmp_path, "commit", "-qm", "first")
    commit = git(tmp_path, "rev-parse", "--short=10", "HEAD")
    assert revision(tmp_path, "own") == commit
    assert revision(tmp_path, "other") == UNKNOWN, "not of this checkout"
    (tmp_path / "own" / "a.py").write_text("2\n")
    changed = revision(tmp_path, "own")
    assert changed.startswith(f"{commit}+")
    (tmp_path / "own" / "a.py").write_text("3\n")
    assert revision(tmp_path, "own") not in (changed, commit)


def test_outside_any_checkout_it_is_unknown(tmp_path: Path) -> None:
    assert revision(tmp_path, ".") == UNKNOWN
