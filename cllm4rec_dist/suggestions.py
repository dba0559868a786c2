"""'Did you mean': the known word, or the file, that comes closest to one that is not there."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

from cllm4rec_dist.filesystems import is_url


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that is spelt most alike, case aside; None where none is near."""
    by_case = {each.casefold(): each for each in known}
    found = get_close_matches(word.casefold(), by_case, n=1, cutoff=0.6)
    return by_case[found[0]] if found else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` for the end of a cure; empty where no known word is near."""
    found = closest(word, known)
    return "" if found is None else f" Did you mean {found!r}?"


def decimal_hint(text: str) -> str:
    """` Write 3.5: ...` for a number with a comma, for the end of a cure; empty for anything else."""
    number = text.strip().replace(",", ".")
    is_number = re.fullmatch(r"[-+]?\d*,\d+", text.strip()) is not None
    return f" Write {number}: the decimal mark is a point." if is_number else ""


def closest_path(path: str) -> str | None:
    """An existing local path that differs from `path` in one part alone, spelt alike; None where there is none."""
    if is_url(path):
        return None
    parts = Path(path).parts
    for number, part in enumerate(parts):
        parent = Path(*parts[:number])
        if os.path.lexists(parent / part):
            continue
        found = closest(part, _names(parent))
        if found is None:
            return None
        candidate = parent.joinpath(found, *parts[number + 1 :])
        return str(candidate) if candidate.exists() else None
    return None


def did_you_mean_path(path: str) -> str:
    """As `did_you_mean`, for a path that does not exist."""
    found = closest_path(path)
    if found is None:
        return ""
    shown = os.path.relpath(found) if os.path.isabs(found) else found
    return f" Did you mean {found if shown.startswith('..') else shown!r}?"


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
