"""The rates of a machine, measured once by `python -m apb.calibrate` and kept beside the models."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import asdict
from pathlib import Path

import torch

from apb.cost import NOMINAL_CPU, NOMINAL_GPU, Rates
from apb.errors import InputError
from apb.output import write_json
from apb.paths import data_home


def rates_file(device: torch.device, dtype: torch.dtype) -> Path:
    """Where the rates of one rank's device are kept: they depend on the dtype and on threads."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"cpu {platform.node()} {torch.get_num_threads()} threads"
    stem = re.sub(r"[^a-z0-9]+", "-", f"{name} {str(dtype).removeprefix('torch.')}".lower())
    return data_home() / "rates" / f"{stem}.json"


def known_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The measured rates of this machine, or nominal ones where it has not been calibrated.

    Raises:
        InputError: the file that should hold them does not.
    """
    path = rates_file(device, dtype)
    if not path.is_file():
        return NOMINAL_GPU if device.type == "cuda" else NOMINAL_CPU
    try:
        return Rates(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(
            f"{path} holds no rates ({error}): run `python -m apb.calibrate` again or delete it"
        ) from error


def keep_rates(rates: Rates, device: torch.device, dtype: torch.dtype) -> Path:
    """Write the rates where `known_rates` finds them."""
    path = rates_file(device, dtype)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(rates))
    return path
