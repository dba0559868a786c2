"""Checks of backbones, tokenizers and folders on the local file system, without contacting the hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cllm4rec_dist.corpus.manifest import MANIFEST_NAME
from cllm4rec_dist.errors import CLLM4RecError, ConfigError
from cllm4rec_dist.filesystems import is_url
from cllm4rec_dist.suggestions import closest_path, did_you_mean_path

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def backbone_problems(field: str, name: str, option: str | None = None) -> list[CLLM4RecError]:
    """Return why a backbone cannot be loaded, without contacting the hub.

    Args:
        option: option of the command for another path, or None.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return []
        what = "is a corpus" if (folder / MANIFEST_NAME).is_file() else "has no config.json"
        return [ConfigError(field, name, f"{what}, so it is not a backbone", "Give a folder with config.json.")]
    if folder.exists():
        return [ConfigError(field, name, "is a file", "Give a folder with config.json, or a hub id.")]
    if _is_hub_id(name):
        return []
    moved = f" If it has moved, say where: {option} PATH." if option else ""
    cure = f"Give a folder with config.json, or a hub id (owner/name).{did_you_mean_path(name)}{moved}"
    return [ConfigError(field, name, "does not exist", cure)]


def tokenizer_problems(name: str, recipe: Path) -> list[CLLM4RecError]:
    """Return why the tokenizer of a backbone cannot be loaded, without contacting the hub.

    Args:
        recipe: recipe of the corpus, for the cure.
    """
    folder = Path(name)
    if folder.is_dir():
        if any((folder / file).is_file() for file in _TOKENIZER_FILES):
            return []
        cure = "Give a backbone folder with tokenizer.json."
        return [ConfigError("--tokenizer", name, "has no tokenizer", cure)]
    if not folder.exists() and _is_cached(name):
        return []
    what = "is a file" if folder.exists() else "does not exist"
    cure = f"Build one: `cllm4rec build-backbone {recipe} {name}`. A backbone of a hub must be downloaded first."
    return [ConfigError("--tokenizer", name, what, f"{cure}{did_you_mean_path(name)}")]


def _is_hub_id(name: str) -> bool:
    """False for a local path; a name counts as one if its first folder, or one of similar spelling, exists here."""
    if is_url(name) or name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/") or name.count("/") > 1:
        return False
    if _is_cached(name):
        return True
    owner, slash, _ = name.partition("/")
    return not Path(owner).is_dir() if slash else closest_path(name) is None


def _is_cached(name: str) -> bool:
    """True if the local hub cache has a model of this id."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return (Path(cache).expanduser() / f"models--{name.replace('/', '--')}").is_dir()


def folder_problems(field: str, path: str, cure: str = "Give a folder.") -> list[CLLM4RecError]:
    """Return why a local folder, which need not exist yet, cannot be written. Creates no file.

    Args:
        cure: cure for a URL.
    """
    if is_url(path):
        return [ConfigError(field, path, "is a URL, but must be a local folder", cure)]
    folder = Path(path).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        what = "a file" if existing.is_file() else "a broken link" if existing.is_symlink() else "not a folder"
        return [ConfigError(field, path, f"cannot be a folder: {existing} is {what}", "Choose another path.")]
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        return [ConfigError(field, path, reason, f"Choose another path, or make {existing} writable.")]
    return []
