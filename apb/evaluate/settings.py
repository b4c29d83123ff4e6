"""What an evaluation is told on the command line."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from apb.arguments import whole_number
from apb.config import RunConfig, compose_config
from apb.errors import InputError
from apb.evaluate.match import match_all, match_part, word_f1
from apb.evaluate.tasks import GROUPS, PROSE, TASKS
from apb.launcher_config import RayLauncherConfig
from apb.launchers.opening import default_world_size
from apb.plugins import PLUGINS
from apb.report import installed_versions

METRICS = {"part": match_part, "all": match_all, "f1": word_f1}
"""How answers to the user's own questions may be scored."""

_KEYS = ("tasks", "methods", "lengths", "samples", "output", "baseline", "data", "metric")
_IN_BLOCKS = ("apb", "star", "auto")
"""Methods that are not exact, so that it matters into how many blocks they cut a document."""
_NUM_BLOCKS = 8
"""Of those methods where one rank runs all of them: the paper's number of ranks."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Which samples, by which methods, and where results go.

    Attributes:
        tasks: generated ones, in the order of the table.
        methods: label to the overrides that make up its configuration.
        lengths: of documents, in tokens, rising.
        samples: of each task at each length.
        data: files with questions of the user's, and how their answers are scored.
        overrides: those of the command line, which every row depends on.
        baseline: another evaluation to compare with; None is the first method.
        command: that these settings come from.
        config: of the first method; methods differ in nothing that an evaluation itself reads.
    """

    tasks: tuple[str, ...]
    methods: Mapping[str, tuple[str, ...]]
    lengths: tuple[int, ...]
    samples: int
    data: tuple[Path, ...]
    metric: str
    overrides: tuple[str, ...]
    output: Path
    baseline: Path | None
    command: str
    config: RunConfig

    def identity(self) -> dict[str, Any]:
        """What rows in one folder have to share; methods may be added."""
        return _identity(self.methods, self.overrides, self.data, self.metric)


def parse_settings(arguments: Sequence[str]) -> Settings:
    """Settings out of words: ours by name, everything else an override.

    Raises:
        InputError: an unknown task, method or setting, or a value out of range.
    """
    values: dict[str, str] = {}
    overrides: list[str] = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not value:
            raise InputError(
                f"{argument} is no setting: write key=value (ours: {', '.join(_KEYS)})"
            )
        if key in _KEYS:
            values[key] = value
        else:
            overrides.append(argument.removeprefix("+"))
    data = tuple(Path(name) for name in _listed(values.get("data", "")))
    metric = values.get("metric", "part")
    if metric not in METRICS:
        raise InputError(f"metric={metric} must be one of {', '.join(METRICS)}")
    stems = [path.stem for path in data]
    if len({*stems, *TASKS, PROSE}) < len(stems) + len(TASKS) + 1:
        raise InputError(f"data={values['data']}: files need names of their own, and no task's")
    tasks = _tasks(_listed(values.get("tasks", "" if data else "ruler")))
    lengths = _lengths(values.get("lengths", "4096"))
    samples = whole_number("samples", values.get("samples", "20"))
    common = tuple(sorted(overrides))
    methods, config = _methods(_listed(values.get("methods", "full,star,apb")), overrides)
    folder = f"{config.model.name}-{_short(_identity({}, common, data, metric))}"
    return Settings(
        tasks=tasks,
        methods=methods,
        lengths=lengths,
        samples=samples,
        data=data,
        metric=metric,
        overrides=common,
        output=Path(values.get("output", f"outputs/evaluate/{folder}")),
        baseline=Path(values["baseline"]) if "baseline" in values else None,
        command=shlex.join(["python", "-m", "apb.evaluate", *arguments]),
        config=config,
    )


def _identity(
    methods: Mapping[str, Sequence[str]], common: Sequence[str], data: Sequence[Path], metric: str
) -> dict[str, Any]:
    return {
        "overrides": list(common),
        "data": {path.stem: _digest(path) for path in data},
        "metric": metric,
        "versions": installed_versions(),
        "methods": {label: list(own) for label, own in methods.items()},
    }


def _short(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    except OSError as error:
        raise InputError(f"data={path} cannot be read ({error}): give a JSONL file") from error


def _listed(value: str) -> list[str]:
    """The parts of ``[a,b]`` or ``a,b``, each once."""
    inner = value.removeprefix("[").removesuffix("]")
    return list(dict.fromkeys(part.strip() for part in inner.split(",") if part.strip()))


def _tasks(names: Sequence[str]) -> tuple[str, ...]:
    known = (*TASKS, PROSE)
    chosen: set[str] = set()
    for name in names:
        if name not in known and name not in GROUPS:
            options = ", ".join((*GROUPS, *known))
            raise InputError(f"tasks={name} is unknown: choose from {options}")
        chosen.update(GROUPS.get(name, (name,)))
    return tuple(name for name in known if name in chosen)


def _lengths(value: str) -> tuple[int, ...]:
    found = {whole_number("lengths", part) for part in _listed(value)}
    if not found:
        raise InputError(f"lengths={value} names no length: give numbers of tokens")
    return tuple(sorted(found))


def _methods(
    labels: Sequence[str], overrides: Sequence[str]
) -> tuple[dict[str, tuple[str, ...]], RunConfig]:
    """Each label with its overrides, and the configuration of the first.

    ``apb+method.wire=int8`` has a setting of its own.

    Settings of a method go to those that have them, so that ``method/compressor=query`` may stand
    beside ``methods=[full,apb]``.
    """
    if any(override.partition("=")[0] == "method" for override in overrides):
        raise InputError("method= has no place here: name one or more as methods=[full,apb]")
    names = [label.partition("+")[0] for label in labels]
    for name in names:
        if name not in PLUGINS["method"]:
            known = ", ".join(PLUGINS["method"])
            raise InputError(f"methods={name} is unknown: choose from {known}")
    if not names:
        raise InputError("methods= names no method: give one or more, such as methods=[full,apb]")
    for override in overrides:
        if not any(_applies(override, name) for name in names):
            raise InputError(f"{override} applies to none of methods={','.join(names)}")
    methods, configs = {}, []
    for label, name in zip(labels, names, strict=True):
        given = [override for override in overrides if _applies(override, name)]
        own = [f"method={name}", *given, *label.split("+")[1:]]
        config = compose_config(own)
        on_cluster = isinstance(config.launcher, RayLauncherConfig)  # one rank per GPU of it
        alone = config.world_size == 1 or (
            config.world_size is None and not on_cluster and default_world_size(config) == 1
        )
        if name in _IN_BLOCKS and config.num_blocks is None and alone:
            own.append(f"num_blocks={_NUM_BLOCKS}")
        methods[label] = tuple(own)
        configs.append(config)
    return methods, configs[0]


def _applies(override: str, name: str) -> bool:
    key = override.partition("=")[0]
    if key == "num_blocks":
        return name in _IN_BLOCKS
    group, _, rest = key.replace("/", ".").partition(".")
    known = {field.name for field in fields(PLUGINS["method"][name])}
    return group != "method" or rest.partition(".")[0] in known
