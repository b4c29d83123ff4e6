"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.forked_ranks import start_forked_rank


@pytest.fixture(scope="module", autouse=True)
def _forked() -> Iterator[None]:
    """Ranks of this process fork from a server: most of a rank's start is importing libraries.

    Those of command lines and scripts start as they do for users.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apb.launchers.processes.start_rank", start_forked_rank)
        yield
