"""Networks on which ranks cannot meet are one sentence that says what to set."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from apb.errors import EngineDeadError
from apb.launchers import torchrun


def test_who_cannot_meet_the_others_says_which_setting_may_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("connectFullMesh failed with: no route\n at pair.cc:144")

    monkeypatch.setattr(torchrun, "join_group", fail)
    with pytest.raises(EngineDeadError) as caught:
        torchrun._join(3, 4)
    sentence = str(caught.value)
    assert sentence.startswith("rank 3 on ")
    assert "(connectFullMesh failed with: no route)" in sentence
    assert "GLOO_SOCKET_IFNAME" in sentence
    assert "\n" not in sentence
