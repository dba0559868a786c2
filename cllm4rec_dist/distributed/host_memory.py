"""Memory of this process that is freed but still held by allocators."""

from __future__ import annotations

import ctypes

import pyarrow as pa


def return_freed_memory() -> None:
    """Return to the operating system what pyarrow and glibc keep for later allocations; other C libraries keep it."""
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
