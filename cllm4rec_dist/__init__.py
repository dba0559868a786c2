"""Distributed training of CLLM4Rec: LLM recommenders in which every user and every item is a token.

Public are the names below; importing the package imports none of what they need.
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cllm4rec_dist.errors import CLLM4RecError
    from cllm4rec_dist.serving.recommender import Recommender

__all__ = ["CLLM4RecError", "Recommender", "__version__"]

try:
    __version__ = version("cllm4rec_dist")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

_HOMES = {"CLLM4RecError": "cllm4rec_dist.errors", "Recommender": "cllm4rec_dist.serving.recommender"}

# PEFT imports bitsandbytes wherever it is installed, which then tells every process of a kernel that it does without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
