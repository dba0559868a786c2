"""Resolve a backbone's folder: a local one, or the cached snapshot of a hub id.

Only files that are read are downloaded, by exact name: repositories also hold the weights in other formats
(`original/*`, `consolidated*`, onnx, gguf, pickles), each as large as the model. If the hub cannot be reached, the
cached snapshot is used, whatever files it has; a missing file is an error when it is read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.pretrained import MARKER_FILES
from cllm4rec_dist.model.weights import CONFIG, INDEX, WEIGHTS, weight_names

logger = logging.getLogger(__name__)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def local_folder(name: str, *, weights: bool = True) -> Path:
    """Return the folder of a backbone.

    Args:
        name: a folder, or a hub id.
        weights: download the weights of a hub id too.

    Raises:
        ConfigError: if there is no such folder, and the hub id is neither reachable nor cached.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/"):
        state = "is a file" if folder.is_file() else "does not exist"
        raise ConfigError("backbone", name, f"{state}", "Give a folder with config.json, or a hub id (owner/name).")
    files = [CONFIG, *TOKENIZER_FILES, *MARKER_FILES, *([WEIGHTS, INDEX] if weights else [])]
    try:
        snapshot = _snapshot(name, files)
    except Exception as error:
        raise ConfigError(
            "backbone",
            name,
            f"is neither a folder nor a hub id that can be fetched ({error})",
            "Give a folder with config.json.",
        ) from error
    absent = [file for file in weight_names(snapshot) if not (snapshot / file).is_file()] if weights else []
    if absent:
        try:
            snapshot = _snapshot(name, absent, revision=snapshot.name)
        except Exception as error:
            raise ConfigError(
                f"backbone {name}",
                absent[0],
                f"is not in the cached snapshot and cannot be fetched ({error})",
                "Fetch the backbone on a machine that reaches the hub.",
            ) from error
    return snapshot


def _snapshot(name: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Return the cached snapshot of a hub id, after downloading those of `files` that the hub has, if reachable."""
    from huggingface_hub import snapshot_download  # imported for hub ids only
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    download = partial(snapshot_download, repo_id=name, revision=revision, allow_patterns=list(files))
    try:
        return Path(download())
    except Exception as error:
        # The cache needs neither a reachable hub, nor a working proxy, nor the token of a gated repository.
        try:
            snapshot = Path(download(local_files_only=True))
        except IncompleteSnapshotError as incomplete:
            snapshot = Path(incomplete.snapshot_path)
        except LocalEntryNotFoundError:
            raise error from None
        logger.warning("backbone %s: using the cached snapshot as it is (%s)", name, error)
        return snapshot
