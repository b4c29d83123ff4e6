"""Where and of what a benchmark was run: hardware, versions, revision of the source."""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from apb.report import processor_name
from apb.revision import revision

ROOT = Path(__file__).parents[1]
REPORTS = Path(__file__).parent / "reports"


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """What a reader needs to judge or repeat a number."""

    command: str
    revision: str
    """The commit; behind a plus, a digest of what the checkout changes in tracked source."""
    hardware: str
    cores: int
    memory_gib: int
    instructions: str
    load_average: float
    """Of the minute before the start; well above 0, other programs took part of the machine."""
    system: str
    versions: dict[str, str]

    @classmethod
    def read(cls, module: str) -> Environment:
        """The environment of the running benchmark, started as ``python -m module``."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        packages = ("apb", "torch", "transformers", "tokenizers", "numpy")
        return cls(
            command=shlex.join(["python", "-m", module, *sys.argv[1:]]),
            revision=revision(ROOT, "apb", "kernels", "conf", "benchmarks/*.py"),
            hardware=hardware(),
            cores=os.cpu_count() or 1,
            memory_gib=round(memory / 2**30),
            instructions=torch.backends.cpu.get_cpu_capability(),
            load_average=round(os.getloadavg()[0], 2),
            system=f"{platform.system()} {platform.release()}",
            versions={
                "python": platform.python_version(),
                **{name: version(name) for name in packages},
            },
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The environment as a Markdown list."""
        versions = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return [
            f"* command: `{self.command}`",
            f"* hardware: {self.hardware}, {self.cores} cores ({self.instructions}), "
            f"{self.memory_gib} GiB, {self.system}",
            f"* source: {self.revision}; {versions}",
            f"* load average when the run began: {self.load_average}",
        ]


def hardware() -> str:
    """The GPU's name or, without one, the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor_name()


def hardware_slug() -> str:
    """The hardware as part of a file name, such as ``amd-epyc-2cores``."""
    slug = re.sub(r"[^a-z0-9]+", "-", hardware().lower()).strip("-")
    return slug if torch.cuda.is_available() else f"{slug}-{os.cpu_count()}cores"
