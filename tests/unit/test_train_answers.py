"""Answers to train on: what the model says to each prompt alone, and all of it after a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from apb.config import compose_config
from apb.hf.batch import BatchGenerator
from apb.hf.model import CausalLM
from apb.train.__main__ import main

TEXT = (
    "The mill stood by the river. Its miller kept bees, {number} hives of them, behind the weir. "
)


def command(tmp_path: Path, output: str, *more: str) -> list[str]:
    (tmp_path / "text.txt").write_text("".join(TEXT.format(number=n) for n in range(60)))
    return [
        *("answers", "+model=tiny", "dtype=float32", f"data={tmp_path / 'text.txt'}"),
        *(f"output={tmp_path / output}", "prompt=60", "max_tokens=8", "batch=3", *more),
    ]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_prompts_side_by_side_get_the_answers_that_each_gets_alone() -> None:
    model = CausalLM.load(
        compose_config(["model=tiny"]).model, dtype=torch.float32, device=torch.device("cpu")
    )
    prompts = [[(7 * i + j) % 250 for i in range(5 + 9 * j)] for j in range(4)]
    greedy: dict[str, Any] = {"max_tokens": 10, "temperature": 0.0, "seed": 0}
    free = BatchGenerator(model, [383]).answers(prompts, **greedy)
    stop = free[1][4]
    generator = BatchGenerator(model, [stop])
    together = generator.answers(prompts, **greedy)
    assert together == [generator.answers([ids], **greedy)[0] for ids in prompts]
    assert together[1] == free[1][: free[1].index(stop) + 1]
    sampled = [
        generator.answers(prompts, max_tokens=10, temperature=2.0, seed=seed) for seed in (0, 0, 1)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


def test_an_interrupted_run_ends_as_one_that_was_not(tmp_path: Path) -> None:
    assert main(command(tmp_path, "whole.jsonl", "count=9")) == 0
    whole = (tmp_path / "whole.jsonl").read_text()
    found = records(tmp_path / "whole.jsonl")
    assert len(found) == 9
    assert all(0 < len(record["token_ids"]) <= 8 < len(record["prompt_ids"]) for record in found)
    three = "".join(whole.splitlines(keepends=True)[:3])
    (tmp_path / "broken.jsonl").write_text(three + '{"prompt_ids": [1')
    assert main(command(tmp_path, "broken.jsonl", "count=9")) == 0
    assert (tmp_path / "broken.jsonl").read_text() == whole


def test_answers_are_what_heads_and_lists_are_made_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, "answers.jsonl", "count=12")) == 0
    arguments = [f"generations={tmp_path / 'answers.jsonl'}", f"output={tmp_path / 'head'}"]
    sizes = ["lessons=12", "length=40", "held_out=4", "steps=2", "batch=2"]
    assert main(["eagle", "+model=tiny", *arguments, *sizes]) == 0
    assert "held-out agreement" in capsys.readouterr().out
    (tmp_path / "other.jsonl").write_text('{"token_ids": [1, 2]}\n')
    arguments[0] = f"generations={tmp_path / 'other.jsonl'}"
    assert main(["eagle", "+model=tiny", *arguments, *sizes, f"work={tmp_path / 'other'}"]) == 2
    assert "no prompt_ids and token_ids" in capsys.readouterr().err


def test_too_little_text_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(tmp_path, "few.jsonl", "count=1000")) == 2
    assert "fewer than count=1000" in capsys.readouterr().err
