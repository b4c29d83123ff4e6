"""Which source a result comes from."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

UNKNOWN = "unknown"


def revision(checkout: Path, *paths: str) -> str:
    """The commit of a checkout; behind a plus, a digest of what it changes in tracked `paths`.

    `UNKNOWN` where there is no git, or the paths are of no checkout, such as an installed package.
    """
    if not _git(checkout, "ls-files", "--", *paths):
        return UNKNOWN
    commit = _git(checkout, "rev-parse", "--short=10", "HEAD").decode().strip()
    changes = _git(checkout, "diff", "HEAD", "--", *paths)
    return f"{commit}+{hashlib.sha256(changes).hexdigest()[:8]}" if changes else commit


def _git(checkout: Path, *arguments: str) -> bytes:
    try:
        return subprocess.run(["git", *arguments], cwd=checkout, capture_output=True).stdout
    except FileNotFoundError:
        return b""
