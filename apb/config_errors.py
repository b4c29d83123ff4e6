"""What Hydra and OmegaConf say of wrong settings, as users get it: the key and what is wrong."""

from __future__ import annotations

import re
from dataclasses import fields
from difflib import get_close_matches

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException


def one_sentence(error: Exception) -> str:
    """The gist of paragraphs that are written for the authors of configurations."""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        group, _, name = error.missing_cfg_file.rpartition("/")
        options = [option for option in error.options or () if not option.endswith("_schema")]
        return f"{group}={name} does not exist: choose one of {', '.join(options)}"
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override!r} is no setting: write KEY=VALUE, and a value with other characters "
            "than letters, digits and -_./ in quotation marks"
        )
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    text = next(line for line in [*str(cause).splitlines(), type(error).__name__] if line.strip())
    text = text.strip()
    key = getattr(cause, "full_key", None)
    if isinstance(cause, ConfigAttributeError | ConfigKeyError) and key:
        return _unknown(key, cause.object_type)
    for pattern, advice in _ADVICE.items():
        if (found := re.match(pattern, text)) is not None:
            return f"{found[1]} {advice}"
    text = text.replace("is incompatible with type hint 'Union[int, float]'", "is not a number")
    return f"{key}: {text}" if key else text


_ELSEWHERE = "does not apply to the other settings given"
_ADVICE = {
    r"Could not override '(.*)'\. No match in the defaults list": _ELSEWHERE,
    r".* object has no attribute '(.*)'": _ELSEWHERE,  # the composition has it, the schema does not
    r"Could not append to config\. An item is already at '(.*)'": "has a value: drop the plus",
}


def _unknown(key: str, schema: type | None) -> str:
    known = [field.name for field in fields(schema)] if schema else []
    close = get_close_matches(key.rpartition(".")[2], known, n=1)
    if not known:
        return f"{key} {_ELSEWHERE}"
    advice = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(known)}"
    return f"unknown setting {key}: {advice}"
