"""Faster imports of libraries, without modules that nothing here uses."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_DISABLE = "TORCHDYNAMO_DISABLE"


@contextmanager
def hidden_modules(*names: str) -> Iterator[None]:
    """Let packages look as if they were not installed, unless they have been imported already."""
    hidden = [name for name in names if name not in sys.modules]
    # An entry of None makes an import raise ModuleNotFoundError (Python's reference, "The module cache").
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def torch_compile_disabled() -> Iterator[None]:
    """Let `torch.compile` return functions unchanged; as a decorator it imports the compiler at once."""
    before = os.environ.get(_DISABLE)
    os.environ[_DISABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DISABLE]
        else:
            os.environ[_DISABLE] = before
