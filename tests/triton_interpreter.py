"""Triton's interpreter, which runs kernels on a CPU, mended where it is wrong."""

from __future__ import annotations

import os
from typing import Any


def use_interpreter() -> None:
    """Interpret the kernels that are imported from now on.

    Triton 3.9 keeps bfloat16 in arrays of uint16 and multiplies those as integers; operands of
    `tl.dot` are converted here, as its other operations already do.
    """
    os.environ["TRITON_INTERPRET"] = "1"
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    create_dot = InterpreterBuilder.create_dot

    def converting(builder: Any, a: Any, b: Any, *args: Any) -> Any:
        wide = [
            builder.create_fp_ext(x, tl.float32) if x.dtype == tl.bfloat16 else x for x in (a, b)
        ]
        return create_dot(builder, *wide, *args)

    InterpreterBuilder.create_dot = converting
