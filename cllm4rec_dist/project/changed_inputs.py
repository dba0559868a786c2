"""Comparison of a stage's inputs with those that its record has, in words.

Inputs are plain values (`stages.inputs_of`): settings, raw files by path, and digests of the outputs of earlier stages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cllm4rec_dist.config import BackboneConfig, RunConfig, StrictModel, dotted_items, validate
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.filesystems import is_url

PATHS = ("corpus", "backbone", "output", "init_from")
"""Settings of a run that its record leaves out."""
MAX_CHANGES = 8
"""Changes that are named; the others are counted."""
_TYPED_AS = {"build-backbone": "backbone.", "pretrain": "pretrain.", "finetune": "finetune.", "recommend": "--"}
"""Prefix of a stage's settings on the command line."""
_CONFIGS: dict[str, tuple[type[StrictModel], tuple[str, ...]]] = {
    "build-backbone": (BackboneConfig, ()),
    "pretrain": (RunConfig, PATHS),
    "finetune": (RunConfig, PATHS),
}
"""Model of a stage's settings, and the fields that its record leaves out."""


def with_digests(inputs: dict[str, Any]) -> dict[str, Any]:
    """Add the sha256 of local raw files to the inputs, so that a copy with a new time counts as unchanged."""
    files = {
        path: stat if is_url(path) else stat | {"sha256": file_digest(Path(path))}
        for path, stat in inputs.get("raw files", {}).items()
    }
    return inputs | {"raw files": files} if files else inputs


def changes_of(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the changes of a stage's inputs, one clause each; a raw file with a new time alone is unchanged."""
    keys = changed_keys(before, now)
    was, is_now = dict(dotted_items(_without_files(before))), dict(dotted_items(_without_files(now)))
    for key in keys[:MAX_CHANGES]:
        if key.startswith("raw files "):
            yield f"{key.removeprefix('raw files ')} has changed"
        elif key in ("corpus", "pretraining", "finetuning") or key.startswith(("backbone", "checkpoint")):
            yield f"the {key.partition('.')[0]} has changed"
        else:
            typed = f"{_TYPED_AS[name]}{key.removeprefix('settings.')}" if key.startswith("settings.") else key
            yield f"{typed}: {was.get(key)!r} is now {is_now.get(key)!r}"
    if len(keys) > MAX_CHANGES:
        yield f"and {len(keys) - MAX_CHANGES} more"


def with_defaults(name: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return recorded inputs with the defaults of settings that were added since the record was written."""
    complete = dict(inputs)
    try:
        if name in _CONFIGS and "settings" in inputs:
            model, unused = _CONFIGS[name]
            values = validate(model, dict.fromkeys(unused, "unused") | inputs["settings"], name).model_dump(mode="json")
            complete["settings"] = {key: value for key, value in values.items() if key not in unused}
        if "recipe" in inputs:
            values = validate(PrepareConfig, {"name": name} | inputs["recipe"], name).model_dump(mode="json")
            complete["recipe"] = values if name == "prepare" else {"source": values["source"]}
    except ConfigError:  # settings that this version does not have: they differ in any case
        return dict(inputs)
    return complete


def changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the dotted keys whose values differ, and "raw files PATH" for each raw file with other content."""
    was, is_now = dict(dotted_items(_without_files(before))), dict(dotted_items(_without_files(now)))
    keys = [key for key, value in was.items() if is_now.get(key, _ABSENT) != value]
    files_before, files_now = before.get("raw files", {}), now.get("raw files", {})
    changed = [
        path for path in files_before | files_now if file_differs(path, files_before.get(path), files_now.get(path))
    ]
    return keys + [f"raw files {path}" for path in changed]


_ABSENT = object()


def _without_files(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != "raw files"}


def file_differs(path: str, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """True if a file's content is not the recorded one; it is read only if its size or time differs."""
    if before is None or now is None:
        return True
    if all(before.get(key) == value for key, value in now.items()):
        return False
    same_size = before.get("bytes") == now.get("bytes") and "sha256" in before
    return not (same_size and before["sha256"] == file_digest(Path(path)))


def file_digest(path: Path) -> str | None:
    """Return the sha256 of a file; None if it does not exist."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def sha256_of(content: bytes) -> str:
    """Return the sha256 as hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()
