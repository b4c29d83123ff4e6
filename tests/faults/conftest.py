"""Fixtures of the fault tests."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from faults.leftovers import Leftovers


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Leftovers:
    """What there was before the test, which gets a folder of its own for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return Leftovers.now()
