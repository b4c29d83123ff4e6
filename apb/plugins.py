"""The table of plug-ins: what a configuration can name.

To add one: a file with its class and config, a line here (a compressor: in `apb.compress.table`,
so that it can be fused with others), a YAML file in `conf/`.
"""

from __future__ import annotations

from collections.abc import Mapping

from apb.attention.auto import AutoBackendConfig
from apb.attention.flash import FlashConfig
from apb.attention.fused import FusedConfig
from apb.attention.reference import ReferenceConfig
from apb.attention.sdpa import SdpaConfig
from apb.compress.fusion import FusionConfig
from apb.compress.table import COMPRESSORS
from apb.launcher_config import (
    AutoLauncherConfig,
    LocalLauncherConfig,
    RayLauncherConfig,
    TorchrunLauncherConfig,
)
from apb.methods.apb import ApbConfig
from apb.methods.auto import AutoConfig
from apb.methods.full import FullConfig
from apb.methods.ring import RingConfig
from apb.methods.star import StarConfig
from apb.methods.ulysses import UlyssesConfig
from apb.methods.zigzag import ZigzagConfig
from apb.prompts.source import FileConfig, NeedleConfig, TextConfig
from apb.speculate.draft_model import DraftModelConfig
from apb.speculate.eagle import EagleConfig
from apb.speculate.frspec import FrSpecConfig
from apb.speculate.hybrid import HybridConfig
from apb.speculate.lookup import LookupConfig
from apb.speculate.none import NoDrafterConfig
from apb.speculate.ouroboros import OuroborosConfig
from apb.speculate.recycling import RecyclingConfig
from apb.speculate.stand import StandConfig
from apb.speculate.suffix import SuffixConfig

PLUGINS: Mapping[str, Mapping[str, type]] = {
    "method": {
        "apb": ApbConfig,
        "star": StarConfig,
        "ring": RingConfig,
        "zigzag": ZigzagConfig,
        "ulysses": UlyssesConfig,
        "full": FullConfig,
        "auto": AutoConfig,
    },
    "method/compressor": {**COMPRESSORS, "fusion": FusionConfig},
    "backend": {
        "auto": AutoBackendConfig,
        "fused": FusedConfig,
        "flash": FlashConfig,
        "sdpa": SdpaConfig,
        "reference": ReferenceConfig,
    },
    "drafter": {
        "hybrid": HybridConfig,
        "suffix": SuffixConfig,
        "lookup": LookupConfig,
        "recycling": RecyclingConfig,
        "stand": StandConfig,
        "eagle": EagleConfig,
        "frspec": FrSpecConfig,
        "model": DraftModelConfig,
        "ouroboros": OuroborosConfig,
        "none": NoDrafterConfig,
    },
    "launcher": {
        "auto": AutoLauncherConfig,
        "local": LocalLauncherConfig,
        "torchrun": TorchrunLauncherConfig,
        "ray": RayLauncherConfig,
    },
    "prompt": {"needle": NeedleConfig, "file": FileConfig, "text": TextConfig},
}
