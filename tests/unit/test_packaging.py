"""The wheel carries the package, its kernels and its configuration, and works from any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
CARRIED = {"apb": "apb", "kernels/apb_kernels": "apb_kernels", "conf": "apb/conf"}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory"]
    subprocess.run([*build, str(folder)], cwd=ROOT, check=True)
    (wheel,) = folder.glob("apb-*.whl")
    with ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def files_in(folder: Path) -> set[Path]:
    files = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path for path in files if path.suffix != ".pyc"}


def test_the_wheel_holds_all_that_is_needed_and_nothing_else(unpacked: Path) -> None:
    expected = {
        Path(there) / path for here, there in CARRIED.items() for path in files_in(ROOT / here)
    }
    assert Path("apb/conf/run.yaml") in expected
    packed = {path for path in files_in(unpacked) if not path.parts[0].endswith(".dist-info")}
    assert packed == expected


def test_the_unpacked_wheel_finds_its_own_configuration(unpacked: Path) -> None:
    script = "import apb_kernels, apb.paths; print(apb.paths.config_dir())"
    done = subprocess.run(  # with -c, the working directory is searched before anything installed
        [sys.executable, "-c", script], cwd=unpacked, check=True, capture_output=True, text=True
    )
    assert Path(done.stdout.strip()) == unpacked / "apb/conf"
