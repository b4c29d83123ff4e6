"""The errors a caller can tell apart.

Every message is one sentence: the value, the limit, the setting to change.
"""

from __future__ import annotations


class ApbError(Exception):
    """Base of every error that `apb` raises on purpose."""

    exit_code = 1


class InputError(ApbError, ValueError):
    """The request or the configuration is wrong; the engine has done nothing and is usable."""

    exit_code = 2


class RequestError(ApbError):
    """One request failed while it ran; the engine is still usable."""


class EngineDeadError(ApbError):
    """The ranks are gone: the message is the first cause, and later requests fail with it."""
