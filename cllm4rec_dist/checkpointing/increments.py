"""Checkpoints between two whole ones, which hold the rows that changed since the whole one before: their base.

    checkpoints/step-00000500/      whole (`format.py`)
    checkpoints/step-00001000/      state.json names step-00000500 and the digest of its marker
        shard-*.safetensors         of each table with sparse updates: rows that changed since step-00000500, Adam's
                                    moments of them, and their indices (`TABLE.changed_rows`); all else as ever
    checkpoints/step-00001500/      the same since step-00000500, without step-00001000

So a reader needs two folders, and each is committed and verified as any other. External ids and the linear memory,
which do not change within a run, are read from the base. Another marker than the named one is damage, as is a base that
is missing. Does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field, ValidationError

from cllm4rec_dist.checkpointing.store import USE_ANOTHER, FileEntry, Store
from cllm4rec_dist.config import StrictModel
from cllm4rec_dist.errors import DamagedCheckpointError

STATE_FILE = "state.json"
"""File of a checkpoint with its metadata."""


class Base(StrictModel):
    """The whole checkpoint that an incremental one needs, as its `state.json` names it."""

    name: str = Field(pattern=r"^step-[0-9]+$")
    marker: FileEntry
    """Size and digest of its marker, which has those of its files."""


class _State(StrictModel, extra="ignore"):
    base: Base | None = None


def read_base(store: Store, name: str) -> Base | None:
    """Read which checkpoint a committed one needs; None if it is whole.

    Raises:
        DamagedCheckpointError: if marker or state are damaged.
        CheckpointError: if the store cannot be read.
    """
    files = store.marker(name).files
    if STATE_FILE not in files:
        return None
    content = store.fetch(name, STATE_FILE, files[STATE_FILE]).read_bytes()
    try:
        return _State.model_validate_json(content).base
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise DamagedCheckpointError(
            f"{store.path(name)}/{STATE_FILE}", reason, "is not readable", USE_ANOTHER
        ) from None


def superseded(bases: Mapping[str, str | None], keep: int) -> list[str]:
    """Return the checkpoints to remove, in that order: no incremental one is ever without its base.

    The `keep` newest stay, with their bases, and the `keep` newest whole ones: damage to a base then leaves as many
    others as if all were whole.

    Args:
        bases: by name of each checkpoint, the name of its base; None if it is whole.
    """
    names = sorted(bases)
    newest, whole = names[-keep:], [name for name in names if bases[name] is None][-keep:]
    kept = {*newest, *whole, *(bases[name] for name in newest)}
    return [name for name in reversed(names) if name not in kept]
