"""`python -m apb.train answers +model=NAME data=PATH[,PATH...] output=FILE.jsonl [more]`
`python -m apb.train eagle +model=NAME data=PATH[,PATH...] output=FOLDER [more]`
`python -m apb.train retaining_heads +model=NAME data=PATH[,PATH...] output=FOLDER [more]`

The last two leave weights and a model card in FOLDER. All go on where an interrupted run stopped.

data=PATH,...       text files, folders of them, .jsonl; each may be gzipped (.gz)
field=NAME          of the records in a .jsonl: text, for eagle token ids as well (text)
work=FOLDER         state of training, for eagle features too (OUTPUT/work)
steps=N held_out=N seed=N

answers asks the model about passages of texts: what it says itself teaches drafting heads most, and
ranks tokens best in python -m apb.frequency (generations= there and in eagle).
count=N prompt=N max_tokens=N batch=N seed=N    (2000 answers, 320, 128, 32 at a time, 0)

eagle distils an EAGLE-2 head from the model's hidden states on texts: what drafter.head= takes.
vocabulary=FILE     list of python -m apb.frequency to train for; without one, all tokens
generations=PATH,.. what `answers` wrote; comes before data, one of the two is enough
lessons=N length=N  sequences to learn from and their tokens (1600, 256)
steps=N batch=N unroll=N held_out=N seed=N intermediate_size=N  (1000, 4, 3, 32, 0, the target's)

retaining_heads trains Locret's heads on what answers look at: what method.compressor.heads= takes
with method/compressor=retaining_head. Records hold a document, a question and an answer (or
LongAlign's messages, or LongAlpaca's instruction and output); about texts, questions are made up.
hidden=N            size of the heads (1024)
length=N            most tokens of a document with question and answer (10240)
query_aware=BOOL    show the question before the document, as APB's anchor does (true)
updates=N           optimiser steps per document, each on a part of it (1)
steps=N warm_up=N held_out=N seed=N                                           (3000, 300, 32, 0)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence

from apb.errors import ApbError, InputError
from apb.train import answers_command, eagle_command, retaining_command

_COMMANDS: Mapping[str, Callable[[Sequence[str], str], list[str]]] = {
    "answers": answers_command.run,
    "eagle": eagle_command.run,
    "retaining_heads": retaining_command.run,
}


def main(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    if {"-h", "--help"}.intersection(arguments):
        print(__doc__)  # noqa: T201
        return 0
    try:
        if not arguments or arguments[0] not in _COMMANDS:
            raise InputError(f"say what to train first: {' or '.join(_COMMANDS)}")
        command = " ".join(["python -m apb.train", *arguments])
        print("\n".join(_COMMANDS[arguments[0]](arguments[1:], command)))  # noqa: T201
    except ApbError as error:
        print(f"apb.train: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
