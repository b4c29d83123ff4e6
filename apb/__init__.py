"""apb: answer questions about documents that are too long for one GPU.

Tensors carry their shape as a suffix wherever they cross a function boundary:

    B batch (always 1)      T rows of this forward pass   S keys            U upstream keys
    H query heads           K key/value heads             G = H / K         D head dim
    M model dim             V vocabulary                  L layers          R ranks
    A anchor tokens         P passing tokens per block    N blocks          W observed query rows
"""

from apb.errors import ApbError, EngineDeadError, InputError, RequestError
from apb.llm import LLM
from apb.output import RequestOutput
from apb.sampling import SamplingParams

__all__ = [
    "LLM",
    "ApbError",
    "EngineDeadError",
    "InputError",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
]
