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
from omegaconf import DictConfig

from apb.config import RunConfig, compose_config, normalised, register_configs
from apb.drain import EXIT_CODE, Terminated, draining
from apb.errors import ApbError, EngineDeadError, InputError
from apb.llm import LLM
from apb.log import configure_logging, log_to_file
from apb.output import RequestOutput, trace_paths
from apb.paths import config_dir
from apb.prompts.needle import NeedleCase, is_correct
from apb.prompts.source import FileConfig, PromptText
from apb.table import timing_table

_LOG = logging.getLogger("apb")
_FOLLOWER_OVERRIDES = ("hydra.run.dir=.", "hydra.output_subdir=null")
"""What keeps the other ranks of a torchrun gang from writing output folders of their own."""


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    overrides = normalised(arguments)
    world_size = os.environ.get("WORLD_SIZE")
    configure_logging(rank, None if world_size is None else int(world_size))
    try:
        if not any(argument.startswith("-") for argument in arguments):
            compose_config(overrides)
        _run_hydra(overrides, rank)
    except ApbError as error:
        _report(error, rank)
        if isinstance(error, EngineDeadError) and error.is_told:
            os._exit(error.exit_code)  # an orderly end could wait for ranks that are gone
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Terminated:
        print("apb: ended by SIGTERM before there was an answer", file=sys.stderr)  # noqa: T201
        return EXIT_CODE
    return 0


def _report(error: ApbError, rank: int) -> None:
    """One sentence and, of a rank that hung or failed, its stack; each of them once."""
    if isinstance(error, EngineDeadError) and error.is_told:
        return
    # Bad input is found by every rank alike.
    if rank == 0 or not isinstance(error, InputError):
        who = f"apb: rank {rank}" if rank else "apb"
        lines = [f"{who}: {error}", *getattr(error, "__notes__", ())]
        print("\n".join(lines), file=sys.stderr)  # noqa: T201


def _run_hydra(overrides: list[str], rank: int) -> None:
    """Let Hydra make the output folder and serve ``--help``, ``--cfg job`` and the like."""
    register_configs()
    sys.argv[1:] = [*overrides, *(_FOLLOWER_OVERRIDES if rank else ())]
    errors: list[ApbError] = []

    def job(_: DictConfig) -> None:
        try:
            _answer()
        except ApbError as error:  # Hydra would print a report of its own around it
            errors.append(error)

    hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="run")(job)()
    if errors:
        raise errors[0]


def _answer() -> None:
    """Load the prompt, ask, and show and save the answer."""
    job = HydraConfig.get()
    overrides = list(job.overrides.task)
    is_first = int(os.environ.get("RANK", "0")) == 0
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
        _show(prompt, output)
        for path in output.write(output_path):
            _LOG.info("result in %s", path)


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
    path = Path(config.output).absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"output={config.output} is no file in an existing folder")
    if config.trace:
        trace_paths(Path(config.output))
    return path


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
