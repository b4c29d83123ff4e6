"""lm-evaluation-harness on `apb` and on its own Hugging Face model: the same answers and scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apb.config import compose_config
from apb.hf.checkpoint import Checkpoint

pytest.importorskip("lm_eval", reason="needs pip install 'apb[eval]'")
pytestmark = [pytest.mark.model, pytest.mark.slow, pytest.mark.timeout(600)]

CHOICES = [
    ("The capital of France is", [" Paris", " Rome", " a banana"], 0),
    ("Two and two make", [" seven", " four", " green"], 1),
    ("", [" The sky is blue.", " Sky the blue is."], 0),
    ("Bees make honey, and cows give", [" milk", " wool and much else besides"], 0),
]
TEXTS = [
    ("The days of the week are Monday, Tuesday,", "Wednesday"),
    ("Q: What is the capital of Italy?\nA:", "Rome"),
]
FORMS: dict[str, dict[str, Any]] = {
    "apb_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    },
    "apb_write": {
        "output_type": "generate_until",
        "doc_to_text": "{{text}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n", "Friday"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
    "apb_rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three tasks over files beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows: dict[str, list[dict[str, Any]]] = {
        "apb_choice": [{"text": t, "choices": c, "answer": a} for t, c, a in CHOICES],
        "apb_write": [{"text": text, "answer": answer} for text, answer in TEXTS],
        "apb_rolling": [{"text": f"{text} {answer}."} for text, answer in TEXTS],
    }
    for name, form in FORMS.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(f"{json.dumps(row)}\n" for row in rows[name]))
        task = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "target_delimiter": "",
            **form,
        }
        (folder / f"{name}.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


def results(model: str, arguments: dict[str, Any], tasks: Path, cache: Path) -> dict[str, Any]:
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    import apb.evaluate.lm_eval  # noqa: F401  (it registers `apb`)

    datasets.config.HF_DATASETS_CACHE = cache
    found: dict[str, Any] = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(FORMS),
        task_manager=TaskManager(include_path=str(tasks)),
        batch_size=1,
        device="cpu",
        bootstrap_iters=0,
    )
    return found


def test_full_attention_gives_what_the_harness_s_own_model_gives(
    tasks: Path, tmp_path: Path
) -> None:
    folder = Checkpoint.find(compose_config(["model=smollm2-135m"]).model).location
    own = results("hf", {"pretrained": str(folder), "dtype": "float32"}, tasks, tmp_path)
    settings = {"model": "smollm2-135m", "method": "full", "dtype": "float32", "world_size": 1}
    ours = results("apb", settings, tasks, tmp_path)
    for name in FORMS:
        for metric, value in own["results"][name].items():
            if isinstance(value, float):
                assert ours["results"][name][metric] == pytest.approx(value, rel=1e-4), metric
        for mine, theirs in zip(ours["samples"][name], own["samples"][name], strict=True):
            assert mine["doc_id"] == theirs["doc_id"]
            assert flat(mine["resps"]) == pytest.approx(flat(theirs["resps"]), abs=1e-3)
    assert own["results"]["apb_choice"]["acc,none"] >= 0.5, "a model that knows something"


def test_the_command_line_asks_no_device_of_who_names_none(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    from apb.evaluate.lm_eval import main

    datasets.config.HF_DATASETS_CACHE = tmp_path / "cache"
    options = ["--tasks", "apb_choice", "--include_path", f"{tasks}", "--output_path"]
    arguments = ["--model_args", "model=tiny,method=full,world_size=1"]
    command = ["lm_eval", "run", "--model", "apb", *options, f"{tmp_path}", *arguments]
    monkeypatch.setattr("sys.argv", command)
    assert main() == 0
    (path,) = tmp_path.rglob("results_*.json")
    assert 0 <= json.loads(path.read_text())["results"]["apb_choice"]["acc,none"] <= 1
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", [*command, "--device", "cuda:1"])
    assert main() == 2
    assert "apb.evaluate.lm_eval: device=cuda:1 must be one of auto, cpu, cuda" in (
        capsys.readouterr().err
    )


def flat(responses: Any) -> dict[str, Any]:
    """Nested lists as a mapping that `approx` compares part by part."""
    if not isinstance(responses, list | tuple):
        return {"": responses if isinstance(responses, str | bool) else float(responses)}
    return {
        f"{place}.{key}": value
        for place, part in enumerate(responses)
        for key, value in flat(part).items()
    }
