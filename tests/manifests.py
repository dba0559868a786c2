"""Manifests of corpora whose other files do not exist, for code that reads the manifest alone. Without torch."""

from __future__ import annotations

from typing import Any

from cllm4rec_dist.corpus.manifest import FileEntry, Manifest
from cllm4rec_dist.corpus.recipe import Preparation


def make_manifest(**changes: Any) -> Manifest:
    """Make a manifest of 60 users and 40 items; `changes` are fields."""
    files = [FileEntry(path=f"{kind}.parquet", kind=kind, num_bytes=1, sha256="0" * 64) for kind in ("users", "items")]
    fields: dict[str, Any] = {
        "name": "shop",
        "num_users": 60,
        "num_items": 40,
        "num_interactions": {"train": 400, "valid": 60, "test": 60},
        "num_content": {},
        "tokenizer_fingerprint": "0",
        "preparation": Preparation(),
        "skipped": {},
        "files": tuple(files),
    }
    return Manifest(**fields | changes)
