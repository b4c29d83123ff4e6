"""What the kernels take: every refusal names the argument, its value and what is supported."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_HEAD_DIM = 256
_ALIGNMENT = 16
"""Bytes: what one thread loads at once, and what a tensor descriptor starts at."""


def check_queries(name: str, x_HTD: Tensor) -> None:
    """Refuse a tensor of another rank, dtype, head size or device than the kernels are built for.

    Raises:
        ValueError: naming the argument.
    """
    if x_HTD.dim() != 3:
        raise ValueError(f"{name} has {x_HTD.dim()} dimensions; heads, rows, head size are wanted")
    if x_HTD.dtype not in DTYPES:
        wanted = ", ".join(map(str, DTYPES))
        raise ValueError(f"{name}.dtype={x_HTD.dtype} is not supported; supported are {wanted}")
    head_dim = x_HTD.shape[2]
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head size {head_dim} of {name} is not supported; "
            f"supported are multiples of 8 up to {MAX_HEAD_DIM}"
        )
    check_strides(name, x_HTD)


def check_keys(name: str, x_KSD: Tensor, q_HTD: Tensor) -> None:
    """Refuse keys or values that do not go with the queries.

    Raises:
        ValueError: naming the argument.
    """
    if x_KSD.dim() != 3 or x_KSD.shape[2] != q_HTD.shape[2]:
        raise ValueError(
            f"{name} has shape {tuple(x_KSD.shape)}; key heads, keys and the head size "
            f"{q_HTD.shape[2]} of the queries are wanted"
        )
    if x_KSD.shape[0] == 0 or q_HTD.shape[0] % x_KSD.shape[0]:
        raise ValueError(
            f"{name} has {x_KSD.shape[0]} heads; "
            f"a divisor of {q_HTD.shape[0]} query heads is wanted"
        )
    check_like(name, x_KSD, q_HTD)
    check_strides(name, x_KSD)


def check_scale(scale: float) -> None:
    """Refuse factors with which the largest product is not the largest score.

    Raises:
        ValueError: naming the argument.
    """
    if not scale > 0:
        raise ValueError(f"scale={scale} is not supported; supported are scales above 0")


def check_like(name: str, x: Tensor, q_HTD: Tensor) -> None:
    """Refuse another dtype or device than the queries'.

    Raises:
        ValueError: naming the argument.
    """
    if x.dtype != q_HTD.dtype:
        raise ValueError(f"{name}.dtype={x.dtype} is not the queries' {q_HTD.dtype}")
    check_device(name, x, q_HTD)


def check_device(name: str, x: Tensor, q_HTD: Tensor) -> None:
    """Refuse another device than the queries'.

    Raises:
        ValueError: naming the argument.
    """
    if x.device != q_HTD.device:
        raise ValueError(f"{name}.device={x.device} is not the queries' {q_HTD.device}")


def check_strides(name: str, x: Tensor) -> None:
    """Refuse rows that are not contiguous, or that do not start at multiples of 16 bytes.

    Raises:
        ValueError: naming the argument.
    """
    if x.numel() == 0:
        return
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        raise ValueError(f"{name}.stride(-1)={x.stride(-1)} is not supported; supported is 1")
    for dim in range(x.dim() - 1):
        if x.shape[dim] > 1 and x.stride(dim) * x.element_size() % _ALIGNMENT:
            raise ValueError(
                f"{name}.stride({dim})={x.stride(dim)} is not supported; "
                f"supported are multiples of {_ALIGNMENT} bytes"
            )
    if x.data_ptr() % _ALIGNMENT:
        raise ValueError(f"{name} does not start at a multiple of {_ALIGNMENT} bytes")
