"""`python -m apb.heads convert +model=NAME source=PATH output=FILE.safetensors`
`python -m apb.heads show +model=NAME source=PATH`

Checks retaining heads against a model, and writes them as one safetensors file with their sha256.
PATH is a file or a folder of safetensors, .bin or .pt: heads as thunlp/APB-Locret-* publish them,
alone or among a whole model's weights. method.compressor.heads= takes either form.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from apb.arguments import parse_words
from apb.compress.retaining_file import RetainingHeads, checked_output
from apb.compress.retaining_head import activation
from apb.config import compose_config
from apb.errors import ApbError, InputError
from apb.hf.model import load_config
from apb.hf.shape import model_shape


def _lines(arguments: Sequence[str]) -> list[str]:
    """What the command has to say."""
    if not arguments or arguments[0] not in ("convert", "show"):
        raise InputError("say `convert` or `show` first: see `python -m apb.heads --help`")
    is_conversion = arguments[0] == "convert"
    needed = ("source", "output") if is_conversion else ("source",)
    values, overrides = parse_words(arguments[1:], needed)
    for key in needed:
        if key not in values:
            raise InputError(f"{key}= is needed: see `python -m apb.heads --help`")
    output = checked_output(values["output"]) if is_conversion else None
    config = compose_config(overrides).model
    hf_config = load_config(config)
    heads = RetainingHeads.read(values["source"], model_shape(hf_config))
    act = heads.activation or hf_config.hidden_act
    activation(act)
    if output is not None:
        filled = replace(heads, model=heads.model or config.name, activation=act)
        filled.write(output)
    return _description(heads, act)


def _description(heads: RetainingHeads, act: str) -> list[str]:
    size = sum(weight.nbytes for head in heads.layers for weight in head)
    return [
        f"heads        {len(heads.layers)} of hidden size {heads.hidden_size}, {act}",
        f"weights      {size / 2**20:.1f} MiB of {heads.layers[0].fc1_RI.dtype}".replace(
            "torch.", ""
        ),
        f"made for     {heads.model or 'not recorded'}",
        f"sha256       {heads.sha256}",
    ]


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"-h", "--help"}.intersection(arguments):
        print(__doc__)  # noqa: T201
        return 0
    try:
        print("\n".join(_lines(arguments)))  # noqa: T201
    except ApbError as error:
        print(f"apb.heads: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
