"""Imports without packages that a library would import if it could, and that nothing here uses through it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
