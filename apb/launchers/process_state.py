"""What the system says about processes of this machine; nothing where there is no ``/proc``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def is_gone(pid: int) -> bool:
    """Whether the process has ended, also if nobody has waited for it yet."""
    return Path("/proc/self/stat").exists() and _state(pid) in ("", "Z", "X")


def is_stopped(pid: int) -> bool:
    """Whether a signal or a debugger has stopped the process."""
    return _state(pid) in ("T", "t")


def _state(pid: int) -> str:
    """The letter of ``proc_pid_stat(5)``; empty for a process that is not there."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""
