"""Checkpoints: engine, rows, optimizer states, position and fingerprints under one commit marker.

    checkpoints/step-00000500/
        tables-00000-of-00002.safetensors      this rank's block of every table and of its Adam state
        random-00000-of-00002.safetensors      this rank's random state (backbone dropout only; the rest is keyed)
        head.safetensors, adapter.safetensors  what is replicated, whole
        engine/                                DeepSpeed's own files: partitions of LoRA and its Adam state
        state.json                             stage, step, best result, fingerprints, configuration
        COMMIT.json                            size and sha256 of every file; written last

A folder without its marker is not a checkpoint. Folders are written under another name, committed and renamed; old
ones are removed after that. Tables are safetensors blocks in the one row rule of `RowPartition`, so weights can be read
for any range of rows at any world size, without pickle; the engine's files can be read at the world size that wrote
them.

A weights-only checkpoint (`best`) leaves out optimizer, engine and random state.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from cllm4rec_dist.errors import CheckpointError
from cllm4rec_dist.system import System
from cllm4rec_dist.topology import RowPartition, World

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
COMMIT = "COMMIT.json"
BEST = "best"
_STEP_PREFIX = "step-"


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    Attributes:
        step: completed optimizer steps; everything about the data follows from it.
        best: best validation result so far, and the step it was seen at.
        validations_since_best: for early stopping.
    """

    step: int = 0
    best: float | None = None
    best_step: int | None = None
    validations_since_best: int = 0


def checkpoints_folder(run: Path) -> Path:
    """Where a run keeps its checkpoints."""
    return run / "checkpoints"


def is_committed(folder: Path) -> bool:
    """Whether a folder is a finished checkpoint."""
    return (folder / COMMIT).is_file()


def latest(run: Path) -> Path | None:
    """Newest finished checkpoint of a run to resume from, or None."""
    found = sorted(f for f in checkpoints_folder(run).glob(f"{_STEP_PREFIX}*") if is_committed(f))
    return found[-1] if found else None


def find(path: str) -> Path:
    """A checkpoint by its own folder, or the best (else the newest) one of a run folder.

    Raises:
        CheckpointError: where neither is a finished checkpoint.
    """
    folder = Path(path).absolute()
    candidates = [folder, checkpoints_folder(folder) / BEST, latest(folder)]
    for candidate in candidates:
        if candidate is not None and is_committed(candidate):
            return candidate
    raise CheckpointError(
        "checkpoint",
        path,
        f"is neither a checkpoint nor a run with one (no {COMMIT})",
        "Give a run folder that trained.",
    )


def save(system: System, state: RunState, run: Path, name: str | None = None) -> Path:
    """Write a checkpoint, commit it, and then remove what is too old. Collective.

    Args:
        name: folder name of a weights-only checkpoint; a full one, named after the step, if left out.
    """
    full = name is None
    final = checkpoints_folder(run) / (name or f"{_STEP_PREFIX}{state.step:08d}")
    folder = final.with_name(f".{final.name}.part")
    world = system.world
    if world.is_main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    _barrier(world)
    suffix = f"{world.rank:05d}-of-{world.size:05d}.safetensors"
    save_file(dict(_local_tensors(system, with_optimizer=full)), folder / f"tables-{suffix}")
    if full:
        save_file(_random_state(), folder / f"random-{suffix}")
        system.engine.save(folder / "engine")
    adapter = system.engine.gather_trainable()
    if world.is_main:
        save_file(adapter or {}, folder / "adapter.safetensors")
        save_file(_replicated(system, with_optimizer=full), folder / "head.safetensors")
        (folder / "state.json").write_text(json.dumps(_describe(system, state, full=full), indent=1), encoding="utf-8")
    _barrier(world)
    if world.is_main:
        _commit(folder, final)
        _prune(run, system.config.checkpoint.keep)
    _barrier(world)
    return final


def _local_tensors(system: System, *, with_optimizer: bool) -> Iterator[tuple[str, Tensor]]:
    states = system.table_optimizer.state() if with_optimizer else {}
    for name, parameter, _ in system.recommender.sharded_parameters():
        yield name, parameter.detach().cpu().contiguous()
        for key, value in states.get(name, {}).items():
            yield f"{name}.{key}", value.cpu().contiguous()


def _replicated(system: System, *, with_optimizer: bool) -> dict[str, Tensor]:
    states = system.table_optimizer.state() if with_optimizer else {}
    tensors = {}
    for name, parameter in system.recommender.replicated_parameters():
        tensors[name] = parameter.detach().cpu().clone()
        tensors |= {f"{name}.{key}": value.cpu() for key, value in states.get(name, {}).items()}
    return tensors


def _random_state() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _describe(system: System, state: RunState, *, full: bool) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "resumable": full,
        **vars(state),
        "world_size": system.world.size,
        "num_users": system.corpus.num_users,
        "num_items": system.corpus.num_items,
        "fingerprints": system.fingerprints,
        "config": system.config.model_dump(mode="json"),
    }


def _commit(folder: Path, final: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    marker = json.dumps({"schema_version": SCHEMA_VERSION, "files": listed}, indent=1)
    (folder / COMMIT).write_text(marker, encoding="utf-8")
    # A checkpoint of the same name (`best`) is moved aside and goes only when its successor is in place.
    replaced = final.with_name(f".{final.name}.replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    folder.rename(final)
    shutil.rmtree(replaced, ignore_errors=True)


def _prune(run: Path, keep: int) -> None:
    committed = sorted(f for f in checkpoints_folder(run).glob(f"{_STEP_PREFIX}*") if is_committed(f))
    for folder in committed[:-keep]:
        shutil.rmtree(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _barrier(world: World) -> None:
    if world.size > 1:
        dist.barrier()


def read_state(folder: Path, *, verify: bool = True) -> dict[str, Any]:
    """What a checkpoint says of itself, after its files were held against the commit marker.

    Args:
        verify: compare checksums too, not only sizes.

    Raises:
        CheckpointError: for a missing, truncated or changed file, or a newer schema.
    """
    try:
        marker = json.loads((folder / COMMIT).read_text(encoding="utf-8"))
        files, version = dict(marker["files"]), int(marker["schema_version"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            "checkpoint", str(folder), f"has no readable {COMMIT} ({error})", "Use another one."
        ) from error
    if version > SCHEMA_VERSION:
        raise CheckpointError(str(folder), version, f"is a newer schema than {SCHEMA_VERSION}", "Update cllm4rec_dist.")
    for name, expected in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(str(folder / COMMIT), name, "names a file outside the checkpoint", "Do not use it.")
        size = path.stat().st_size if path.is_file() else None
        if size != expected["bytes"] or (verify and _sha256(path) != expected["sha256"]):
            raise CheckpointError("checkpoint file", str(path), "is not what was committed", "Use another checkpoint.")
    return dict(json.loads((folder / "state.json").read_text(encoding="utf-8")))


def require_same(folder: Path, saved: dict[str, str], own: dict[str, str]) -> None:
    """Refuse a checkpoint of another backbone, corpus or tokenizer, with both fingerprints named."""
    for name, fingerprint in own.items():
        if saved.get(name) != fingerprint:
            raise CheckpointError(
                f"{folder}: {name} fingerprint", saved.get(name), f"is not this run's, {fingerprint}",
                f"Use the {name} that the checkpoint was made with, or start a new run.",
            )  # fmt: skip


def resume(system: System, folder: Path) -> RunState:
    """Restore everything `save` wrote, so that the run goes on as if it had not stopped. Collective.

    Raises:
        CheckpointError: for damage, other fingerprints, or another world size.
    """
    world = system.world
    saved = read_state(folder, verify=world.is_main)
    require_same(folder, saved["fingerprints"], system.fingerprints)
    if not saved["resumable"]:
        raise CheckpointError(
            "checkpoint", str(folder), "holds weights only", "Use it with init_from, or a step-* one."
        )
    if saved["world_size"] != world.size:
        raise CheckpointError(
            str(folder), saved["world_size"], f"ranks wrote it, but this run has {world.size}",
            "Resume with as many ranks, or start a run with init_from, which reads weights at any number.",
        )  # fmt: skip
    load_weights(system, folder)
    system.table_optimizer.load_state(_optimizer_states(system, folder))
    system.engine.load(folder / "engine")
    random = load_file(folder / f"random-{world.rank:05d}-of-{world.size:05d}.safetensors")
    torch.set_rng_state(random["cpu"])
    if "cuda" in random and torch.cuda.is_available():
        torch.cuda.set_rng_state(random["cuda"])
    return RunState(saved["step"], saved["best"], saved["best_step"], saved["validations_since_best"])


def load_weights(system: System, folder: Path) -> None:
    """Read rows, head and adapter of a checkpoint written at any world size. Collective.

    Content rows and the head's options may be missing in the checkpoint (a run without texts): they then stay as they
    started, with a warning.

    Raises:
        CheckpointError: for rows of another width or an adapter of other settings.
    """
    saved = read_state(folder, verify=False)
    for name, parameter, partition in system.recommender.sharded_parameters():
        start, stop = partition.range(system.world.rank)
        block = read_rows(folder, name, start, stop, partition.num_rows, saved["world_size"])
        if block is None:
            logger.warning("%s holds no %s; they stay as they are", folder, name)
            continue
        if block.shape != parameter.shape:
            raise CheckpointError(
                f"{folder}: {name}", tuple(block.shape), f"should be {tuple(parameter.shape)}", "Use another backbone."
            )
        with torch.no_grad():
            parameter.copy_(block)
    replicated = load_file(folder / "head.safetensors")
    for name, parameter in system.recommender.replicated_parameters():
        if name in replicated:
            with torch.no_grad():
                parameter.copy_(replicated[name])
    adapter = load_file(folder / "adapter.safetensors")
    missing = sorted(set(system.engine.trainable) ^ set(adapter))
    if missing:
        raise CheckpointError(
            f"{folder}: adapter", missing[:3], "do not match this run's adapter", "Use the same adapter settings."
        )
    system.engine.set_trainable(adapter)


def read_rows(folder: Path, name: str, start: int, stop: int, num_rows: int, saved_world: int) -> Tensor | None:
    """Rows [start, stop) of a sharded tensor, from whichever files hold them; None where no file has that name."""
    partition = RowPartition(num_rows, saved_world)
    parts = []
    for rank in range(saved_world):
        first, last = partition.range(rank)
        path = folder / f"tables-{rank:05d}-of-{saved_world:05d}.safetensors"
        try:
            with safe_open(path, framework="pt") as tensors:
                if name not in tensors.keys():  # noqa: SIM118 - not a dict
                    return None
                low, high = max(start, first), min(stop, last)
                parts.append(tensors.get_slice(name)[max(low - first, 0) : max(high - first, 0)])
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                "checkpoint file", str(path), f"cannot be read ({error})", "Use another one."
            ) from error
    return torch.cat(parts)


def _optimizer_states(system: System, folder: Path) -> dict[str, dict[str, Tensor]]:
    world = system.world
    tensors = load_file(folder / f"tables-{world.rank:05d}-of-{world.size:05d}.safetensors")
    tensors |= load_file(folder / "head.safetensors")
    states: dict[str, dict[str, Tensor]] = {}
    for name in system.table_optimizer.names:
        found = {
            key: tensors[f"{name}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in tensors
        }
        if found:
            states[name] = {k: v if k == "step" else v.to(world.device) for k, v in found.items()}
    return states
