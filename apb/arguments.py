"""Command lines of ``key=value`` words, some of which are settings of the configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence

from apb.errors import InputError


def parse_words(
    arguments: Sequence[str], known: Sequence[str], *, settings: Sequence[str] = ("model",)
) -> tuple[dict[str, str], list[str]]:
    """Values of the `known` keys, and the words that are settings of the groups named.

    Raises:
        InputError: another key, or no value.
    """
    values, overrides = {}, []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and value and key.removeprefix("+").partition(".")[0] in settings:
            overrides.append(argument)
        elif equals and value and key in known:
            values[key] = value
        else:
            options = ", ".join(f"{name}=" for name in (*settings, *known))
            raise InputError(f"unknown option {argument}: give values to {options}")
    return values, overrides


def whole_number(key: str, value: str, *, least: int = 1) -> int:
    """Raises InputError for anything but a number from `least` on."""
    if not re.fullmatch("[0-9]{1,18}", value) or int(value) < least:
        raise InputError(f"{key}={value} must be a number from {least}")
    return int(value)


def paths_of(value: str) -> tuple[str, ...]:
    """The parts of a list with commas."""
    return tuple(name for name in value.split(",") if name)
