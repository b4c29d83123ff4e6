"""The command line, ``torchrun -m apb.run +model=NAME``: a prompt, its answer and its cost."""

from __future__ import annotations

import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from apb.command import exit_code, this_rank
from apb.config import RunConfig, compose_config, normalised, register_configs
from apb.config_errors import one_sentence
from apb.drain import draining
from apb.errors import InputError
from apb.llm import LLM
from apb.log import log_to_file
from apb.output import RequestOutput, check_output, trace_paths
from apb.paths import config_dir
from apb.prompts.needle import NeedleCase, is_correct
from apb.prompts.source import FileConfig, PromptText
from apb.table import timing_table

_LOG = logging.getLogger("apb")
_FOLLOWER_OVERRIDES = ("hydra.run.dir=.", "hydra.output_subdir=null")
"""What keeps the other ranks of a torchrun gang from writing output folders of their own."""


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    return exit_code("apb", partial(_run, normalised(arguments)))


def _run(overrides: Sequence[str]) -> int:
    if not any(override.startswith("-") for override in overrides):
        compose_config(overrides)
    _run_hydra(overrides)
    return 0


def _run_hydra(overrides: Sequence[str]) -> None:
    """Let Hydra make the output folder and serve ``--help``, ``--cfg job`` and the like."""
    register_configs()
    sys.argv[1:] = [*overrides, *(_FOLLOWER_OVERRIDES if this_rank() else ())]
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # raise errors instead of printing reports
    errors: list[Exception] = []

    def job(_: DictConfig) -> None:
        try:
            _answer()
        except Exception as error:  # told apart from what Hydra raises
            errors.append(error)

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="run")(job)()
    except OSError as error:
        raise InputError(
            f"the folder of this run, {error.filename}, cannot be made ({error.strerror}): set "
            "hydra.run.dir to one that can"
        ) from error
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(one_sentence(error)) from error
    if errors:
        raise errors[0]


def _answer() -> None:
    """Load the prompt, ask, and show and save the answer."""
    job = HydraConfig.get()
    overrides = list(job.overrides.task)
    is_first = this_rank() == 0
    folder = Path(job.runtime.output_dir)
    if is_first:
        log_to_file(folder / "run.log")
    config = compose_config(overrides)
    output_path = _output_path(config, folder) if is_first else folder
    if config.on_rank_loss == "fail":  # there is no second request that other ranks could answer
        overrides.append("on_failure=stop")
    llm = LLM.from_overrides(overrides)
    with closing(llm):
        prompt = _prompt(llm, config, is_first=is_first)
        params = config.decode.sampling_params(seed=config.seed)
        llm.start()
        with draining(config.supervision.drain_s):
            output = llm.ask(prompt.document, prompt.question, params)
    if is_first:
        _deliver(prompt, output, output_path)


def _prompt(llm: LLM, config: RunConfig, *, is_first: bool) -> PromptText:
    """The prompt; a document is read by rank 0, before it meets the others, and by no other."""
    load = partial(config.prompt.load, llm.make_needle, seed=config.seed)
    if not isinstance(config.prompt, FileConfig):
        return load()
    here = iter([load()] if is_first else ())
    return PromptText(*next(llm.shared(here)))


def _output_path(config: RunConfig, folder: Path) -> Path:
    if config.output is None:
        return folder / "result.json"
    check_output(config.output)
    if config.trace:
        trace_paths(Path(config.output))
    return Path(config.output).absolute()


def _deliver(prompt: PromptText, output: RequestOutput, path: Path) -> None:
    """To the file and to stdout, the one also where the other fails."""
    try:
        written = output.write(path)
    finally:
        _show(prompt, output)
    for file in written:
        _LOG.info("result in %s", file)


def _show(prompt: PromptText, output: RequestOutput) -> None:
    lines = [f"question  {prompt.question}", f"answer    {output.text.strip()}"]
    if prompt.answer is not None:
        case = NeedleCase(prompt.document, prompt.question, prompt.answer)
        verdict = "right" if is_correct(case, output.text) else "wrong"
        lines.append(f"expected  {prompt.answer}: {verdict}")
    lines += ["", *timing_table(output.metrics)]
    lines += [f"note: {textwrap.fill(note, 96)}" for note in output.metrics.notes]
    print("\n".join(lines), flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
