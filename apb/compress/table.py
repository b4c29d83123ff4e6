"""The compressors that score tokens by themselves, by the names that a configuration uses."""

from __future__ import annotations

from collections.abc import Mapping

from apb.compress.base import CompressorConfig
from apb.compress.expected_attention import ExpectedAttentionConfig
from apb.compress.keydiff import KeydiffConfig
from apb.compress.knorm import KnormConfig
from apb.compress.lag_kv import LagKvConfig
from apb.compress.query import QueryConfig
from apb.compress.random import RandomConfig
from apb.compress.retaining_head import RetainingHeadConfig
from apb.compress.tova import TovaConfig
from apb.compress.window import WindowConfig

COMPRESSORS: Mapping[str, type[CompressorConfig]] = {
    "query": QueryConfig,
    "window": WindowConfig,
    "retaining_head": RetainingHeadConfig,
    "expected_attention": ExpectedAttentionConfig,
    "keydiff": KeydiffConfig,
    "tova": TovaConfig,
    "knorm": KnormConfig,
    "lag_kv": LagKvConfig,
    "random": RandomConfig,
}
