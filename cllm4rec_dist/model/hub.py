"""Where a backbone is: a folder, or the cached snapshot of a hub id.

Only files that are read are fetched, each by its exact name: repositories also hold the weights in other formats
(`original/*`, `consolidated*`, onnx, gguf, pickles), each as large as the model. Where the hub cannot be reached, the
cached snapshot is used as it is, however it was filtered when it was fetched; what a run then misses is refused by name
when it is read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.pretrained import SIGNS
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
    """The folder of a backbone.

    Args:
        name: the folder itself, or a hub id.
        weights: fetch the weights of a hub id too.

    Raises:
        ConfigError: where there is no such folder, and no such hub id within reach or in the cache.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/"):
        state = "is a file" if folder.is_file() else "does not exist"
        raise ConfigError("backbone", name, f"{state}", "Give a folder with config.json, or a hub id (owner/name).")
    files = [CONFIG, *TOKENIZER_FILES, *SIGNS, *([WEIGHTS, INDEX] if weights else [])]
    try:
        snapshot = _snapshot(name, files)
    except Exception as error:
        raise ConfigError(
            "backbone",
            name,
            f"is neither a folder nor a hub id that can be had ({error})",
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
                "Fetch the backbone where the hub can be reached.",
            ) from error
    return snapshot


def _snapshot(name: str, files: Sequence[str], revision: str | None = None) -> Path:
    """The cached snapshot of a hub id, with these files where the hub has them and can be reached."""
    from huggingface_hub import snapshot_download  # only where a hub id is used
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    download = partial(snapshot_download, repo_id=name, revision=revision, allow_patterns=list(files))
    try:
        return Path(download())
    except Exception as error:
        # The hub cannot be reached, a proxy fails, a gated repository wants a token: the cache needs none of them.
        try:
            snapshot = Path(download(local_files_only=True))
        except IncompleteSnapshotError as incomplete:
            snapshot = Path(incomplete.snapshot_path)
        except LocalEntryNotFoundError:
            raise error from None
        logger.warning("backbone %s: using the cached snapshot as it is (%s)", name, error)
        return snapshot
