"""Checking a model's files against a list of their SHA-256 digests, as `sha256sum` writes it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from apb.errors import InputError

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


def read_manifest(path: Path) -> dict[str, str]:
    """Digest by file name.

    Raises:
        InputError: there is no such file, or it is no such list.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"model.sha256={path} cannot be read: {error}") from error
    digests = {}
    for line in filter(str.strip, lines):
        if (found := _LINE.fullmatch(line)) is None:
            raise InputError(
                f"model.sha256={path} is no list of digests: run `sha256sum *` in the model folder"
            )
        digests[found[2].removeprefix("./")] = found[1].lower()
    return digests


def check_files(
    folder: Path,
    manifest: Mapping[str, str],
    weights: Collection[str],
    *,
    part: int = 0,
    parts: int = 1,
) -> None:
    """Raises InputError unless the folder's files are what the manifest says.

    Args:
        weights: names that it has to list.
        part: of `parts` ranks on this machine, which share the work.
    """
    if unlisted := sorted(set(weights) - manifest.keys()):
        raise InputError(f"model.sha256 does not list {folder / unlisted[0]}: add its digest")
    for name in sorted(manifest)[part::parts]:
        try:
            with (folder / name).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(
                f"model.sha256 lists {folder / name}, which cannot be read: {error.strerror}"
            ) from error
        if digest != manifest[name]:
            raise InputError(
                f"{folder / name} is not the file that model.sha256 lists (its digest is "
                f"{digest[:12]}..., not {manifest[name][:12]}...): fetch it again"
            )
