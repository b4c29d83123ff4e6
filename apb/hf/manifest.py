"""Checking a model's files against a list of their SHA-256 digests, as `sha256sum` writes it."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from apb.errors import InputError

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](.+)")


class Share(NamedTuple):
    """Which of the files one of several ranks checks that load them on the same machine."""

    part: int = 0
    parts: int = 1

    @classmethod
    def of_this_rank(cls) -> Share:
        """By its place among those of its machine; all of them have to check."""
        parts = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(int(os.environ.get("LOCAL_RANK", "0")) % parts, parts)


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
    folder: Path, manifest: Mapping[str, str], weights: Collection[str], share: Share
) -> None:
    """Raises InputError unless the folder's files are what the manifest says.

    Args:
        weights: names that it has to list.
        share: of the work; whether the weights are listed is always checked.
    """
    if unlisted := sorted(set(weights) - manifest.keys()):
        raise InputError(f"model.sha256 does not list {folder / unlisted[0]}: add its digest")
    for name in sorted(manifest)[share.part :: share.parts]:
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
