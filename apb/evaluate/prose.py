"""English prose that every Python environment of this project holds, so nothing is copied here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import distribution
from pydoc_data.topics import topics


def _reference(topic: str) -> str:
    """A section of the Python Language Reference, as ``help(topic)`` prints it."""
    return topics[topic].strip()


def _license(package: str) -> str:
    """The licence that an installed package brings along."""
    files = distribution(package).files or []
    found = [file for file in files if file.name.startswith("LICENSE") and "dist-info" in str(file)]
    return min(found, key=lambda file: len(file.parts)).read_text().strip()


PASSAGES: Mapping[str, Callable[[], str]] = {
    "python-types": partial(_reference, "types"),
    "python-compound": partial(_reference, "compound"),
    "python-specialnames": partial(_reference, "specialnames"),
    "python-debugger": partial(_reference, "debugger"),
    "numpy-license": partial(_license, "numpy"),
    "python-formatstrings": partial(_reference, "formatstrings"),
    "python-typesseq": partial(_reference, "typesseq"),
    "transformers-license": partial(_license, "transformers"),
    "python-typesmapping": partial(_reference, "typesmapping"),
    "python-string-methods": partial(_reference, "string-methods"),
}
"""Name to text, in the order in which a benchmark takes them. No text is part of another."""
