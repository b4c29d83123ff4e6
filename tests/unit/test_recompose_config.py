"""Other settings for ranks that are up: those that would be ignored are refused."""

from __future__ import annotations

import re

import pytest

from apb.config import compose_config, recompose_config
from apb.errors import InputError

MODEL = "model=tiny"


def test_what_ranks_are_started_with_cannot_change_between_requests() -> None:
    old = compose_config([MODEL])
    for override in (
        *("model.path=elsewhere", "dtype=float32", "device=cpu", "runtime.chunk_len=64"),
        *("allow_beyond_context=true", "world_size=3", "launcher=local", "supervision.step_s=5"),
        *("on_failure=stop", "on_rank_loss=degrade", "progress=false"),
    ):
        name = re.split(r"[.=]", override)[0]
        with pytest.raises(InputError, match=f"{name} cannot change from .* between requests"):
            recompose_config(old, [MODEL, override])
    assert recompose_config(old, [MODEL, "seed=3", "decode.max_tokens=9"]).seed == 3
