"""The weight files of a backbone that transformers reads.

A folder may hold other safetensors files too: an average of the weights, the export of another program, an adapter.
All code that reads a backbone uses `weight_files`, which chooses as transformers does
(`modeling_utils._get_resolved_checkpoint_files`), so that word embeddings, decoder and fingerprint belong to one model.
Headers are read without tensors, so that checking a large model takes milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from cllm4rec_dist.distributed.collectives import gather_integers
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import ConfigError, FaultError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_INDEX_SUFFIX = ".safetensors.index.json"
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
"""Files of transformers' distributed checkpoints, which transformers prefers to all others."""
_FETCH_AGAIN = "Fetch the backbone again."


@dataclass(frozen=True)
class StoredWeight:
    """Header of a stored tensor.

    Attributes:
        file: path of its file.
        shape: its sizes.
        dtype: safetensors' name of the dtype: F32, BF16, F8_E4M3, ...
    """

    file: Path
    shape: list[int]
    dtype: str


def read_settings(folder: Path) -> dict[str, Any]:
    """Read config.json as a dict. ConfigError if it is not a JSON object."""
    return _read_object(folder / CONFIG, "is no config.json of a decoder")


def weight_names(folder: Path) -> list[str]:
    """Sorted names of the weight files that transformers would read, relative to the folder; files may be absent.

    Raises:
        ConfigError: for a folder without weights, with a broken index, or with a distributed checkpoint.
    """
    entry = _entry(folder)
    names = set(_weight_map(folder / entry).values()) if entry.endswith(_INDEX_SUFFIX) else {entry}
    for name in names:
        if not _is_inside(name) or not name.endswith(".safetensors"):
            raise ConfigError(
                f"backbone {folder}", name, "is not a safetensors file inside of the folder", _FETCH_AGAIN
            )
    return sorted(names)


def weight_files(folder: Path) -> list[Path]:
    """Paths of the safetensors files that transformers would read, in its order. Pickled weights are not read.

    Raises:
        ConfigError: as in `weight_names`, and if a file is absent.
    """
    files = [folder / name for name in weight_names(folder)]
    if absent := [path.name for path in files if not path.is_file()]:
        raise ConfigError(
            f"backbone {folder}",
            absent[0],
            f"belongs to the backbone but is absent (and {len(absent) - 1} more of {len(files)} weight files)",
            "The download is incomplete: fetch the backbone again.",
        )
    return files


def stored_weights(folder: Path) -> dict[str, StoredWeight]:
    """Headers of all tensors in the weight files, by name.

    Raises:
        ConfigError: for a damaged or truncated file, a tensor in two files, or a tensor that is not in the file that
            the index names.
    """
    headers: dict[str, StoredWeight] = {}
    for path in weight_files(folder):
        with open_weights(path) as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                if name in headers:
                    raise ConfigError(
                        f"backbone {folder}",
                        name,
                        f"is in both {headers[name].file.name} and {path.name}",
                        "Save the model again: model.save_pretrained(folder).",
                    )
                part = tensors.get_slice(name)
                headers[name] = StoredWeight(path, part.get_shape(), part.get_dtype())
    if (entry := _entry(folder)).endswith(_INDEX_SUFFIX):
        _require_indexed(folder, entry, headers)
    return headers


@contextmanager
def open_weights(path: Path) -> Iterator[Any]:
    """Open a safetensors file. ConfigError if it is damaged, or shorter than its header says."""
    try:
        with safe_open(path, framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            "backbone",
            str(path),
            f"is damaged or incomplete ({error})",
            "Fetch the weights again (`git lfs pull`, if it is a Git LFS pointer).",
        ) from error


def fingerprint(folder: Path) -> str:
    """Compute the sha256 of config.json and all weight bytes, which identifies the base model.

    Checkpoints store it, because they do not hold the frozen weights.
    """
    digest = hashlib.sha256()
    settings = read_settings(folder)
    for volatile in ("transformers_version", "_name_or_path"):
        settings.pop(volatile, None)
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for path in weight_files(folder):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def fingerprint_on_each_host(folder: Path, world: World) -> str:
    """Return `fingerprint`, which the first rank of each host computes for all of its ranks. All-gathers 32 bytes.

    Raises:
        FaultError: if hosts have different backbones.
    """
    empty = bytes(32)
    with world.watch.doing("hashing the backbone"):
        digest = bytes.fromhex(fingerprint(folder)) if world.local_rank == 0 else empty
    by_rank = gather_integers(np.frombuffer(digest, np.int64).tolist(), world, what="fingerprints of the backbone")
    digests = [np.array(values, np.int64).tobytes() for values in by_rank]
    first = next(found for found in digests if found != empty)
    others = [rank for rank, found in enumerate(digests) if found not in (empty, first)]
    if others:
        raise FaultError(
            f"{folder} on the hosts of ranks {', '.join(map(str, others))}",
            digests[others[0]].hex()[:12],
            f"is another backbone than {first.hex()[:12]} of the first host",
            "Copy the same files to every host.",
        )
    return first.hex()


def _entry(folder: Path) -> str:
    """Name of the weight file or index that transformers would read first."""
    if distributed := sorted(path.name for path in folder.iterdir() if _DISTRIBUTED.fullmatch(path.name)):
        raise ConfigError(
            f"backbone {folder}",
            distributed[0],
            "is part of a distributed checkpoint, which cannot be read here",
            "Load it with transformers and save it again: model.save_pretrained(folder).",
        )
    chosen = read_settings(folder).get("transformers_weights")
    if chosen is not None:
        if not (isinstance(chosen, str) and _is_inside(chosen)):
            raise ConfigError(
                f"backbone {folder}: transformers_weights", chosen, "is not a file name in the folder", _FETCH_AGAIN
            )
        return chosen
    for name in (WEIGHTS, INDEX):
        if (folder / name).is_file():
            return name
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".gguf"))
    instead = f"; it has {', '.join(others[:3])}" if others else ""
    raise ConfigError(
        "backbone",
        str(folder),
        f"holds no .safetensors file that transformers would read ({WEIGHTS} or {INDEX}{instead})",
        "Convert it, or save it again: model.save_pretrained(folder).",
    )


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def _weight_map(index: Path) -> dict[str, str]:
    """Read an index: tensor name -> file name."""
    content = _read_object(index, "is a damaged index of weight files")
    weights = content.get("weight_map")
    if not (isinstance(weights, dict) and weights and all(isinstance(name, str) for name in weights.values())):
        raise ConfigError(f"backbone {index}: weight_map", weights, "must map each tensor to its file", _FETCH_AGAIN)
    if not isinstance(content.get("metadata"), dict):  # transformers fails without it
        raise ConfigError(
            f"backbone {index}: metadata",
            content.get("metadata"),
            "must be an object, or transformers cannot read the index",
            'Fetch the backbone again, or add "metadata": {}.',
        )
    return weights


def _require_indexed(folder: Path, index: str, headers: dict[str, StoredWeight]) -> None:
    """Refuse weight files without a tensor that the index assigns to them."""
    for name, file in _weight_map(folder / index).items():
        if name not in headers or headers[name].file != folder / file:
            raise ConfigError(
                f"backbone {folder / file}",
                name,
                f"is not in the file, although {index} says so",
                "The download is incomplete or mixed: fetch the backbone again.",
            )


def _read_object(path: Path, constraint: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError("backbone", str(path), f"{constraint} ({error})", _FETCH_AGAIN) from error
    if not isinstance(content, dict):
        raise ConfigError("backbone", str(path), f"{constraint} (not a JSON object)", _FETCH_AGAIN)
    return content
