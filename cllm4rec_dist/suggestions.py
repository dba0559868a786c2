"""'Did you mean' hints for misspelt words and paths, and counts in messages."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from cllm4rec_dist.filesystems import is_url


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice with the most similar spelling, ignoring case; None if none is similar."""
    by_folded = {choice.casefold(): choice for choice in choices}
    matches = get_close_matches(word.casefold(), by_folded, n=1, cutoff=0.6)
    return by_folded[matches[0]] if matches else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the end of a cure; empty if no choice is similar."""
    choice = closest(word, choices)
    return "" if choice is None else f" Did you mean {choice!r}?"


def decimal_hint(text: str) -> str:
    """Return ` Write 3.5: ...` for a number with a decimal comma, for the end of a cure; else empty."""
    number = text.strip().replace(",", ".")
    is_number = re.fullmatch(r"[-+]?\d*,\d+", text.strip()) is not None
    return f" Write {number}: the decimal mark is a point." if is_number else ""


def closest_path(path: str) -> str | None:
    """Return an existing local path that differs from `path` in one part of similar spelling; None if none does."""
    if is_url(path):
        return None
    parts = Path(path).parts
    for index, part in enumerate(parts):
        parent = Path(*parts[:index])
        if os.path.lexists(parent / part):
            continue
        name = closest(part, _names(parent))
        if name is None:
            return None
        candidate = parent.joinpath(name, *parts[index + 1 :])
        return str(candidate) if candidate.exists() else None
    return None


def did_you_mean_path(path: str) -> str:
    """Return `did_you_mean` for a path that does not exist."""
    existing = closest_path(path)
    if existing is None:
        return ""
    shown = os.path.relpath(existing) if os.path.isabs(existing) else existing
    return f" Did you mean {existing if shown.startswith('..') else shown!r}?"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def plural(count: int, noun: str) -> str:
    """Format as `1 rank` or `2 ranks`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
