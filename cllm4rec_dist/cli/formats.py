"""Formats in which lists are written or printed."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """Format of a list."""

    PARQUET = "parquet"
    CSV = "csv"
    JSONL = "jsonl"
    TABLE = "table"
