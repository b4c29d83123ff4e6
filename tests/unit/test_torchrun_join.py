"""Ranks that cannot meet under torchrun say so in one sentence, with what to set."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

from apb.config import compose_config
from apb.errors import EngineDeadError
from apb.launchers import torchrun


@pytest.mark.parametrize("where", ["join_group", "open_store"])
def test_who_cannot_meet_the_others_says_which_setting_may_help(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("connectFullMesh failed with: no route\n at pair.cc:144")

    monkeypatch.setattr(torchrun, where, fail)
    monkeypatch.setattr(torchrun, "agent_keeps_store", lambda: where == "open_store")
    for name, value in {"RANK": "3", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    config = compose_config(["model=tiny", "device=cpu"])
    with pytest.raises(EngineDeadError) as caught:
        torchrun.TorchrunSession(config)
    sentence = str(caught.value)
    assert sentence.startswith("rank 3 on ")
    assert "(connectFullMesh failed with: no route)" in sentence
    assert "GLOO_SOCKET_IFNAME" in sentence
    assert "\n" not in sentence
