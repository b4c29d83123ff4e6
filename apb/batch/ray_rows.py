"""Rows that Ray Data reads: it knows S3, GCS, HDFS and the like, and reads ahead on other nodes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ray

from apb.errors import InputError


def read_columns(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a Parquet or JSON-lines dataset, in its order.

    Raises:
        InputError: it is neither, or cannot be read.
    """
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    is_json = source.rstrip("/").endswith((".jsonl", ".ndjson"))
    try:
        data = ray.data.read_json(source, lines=True) if is_json else ray.data.read_parquet(source)
    except (OSError, ValueError) as error:
        raise InputError(f"input={source} cannot be read: {error}") from error
    return iter(data.iter_rows())
