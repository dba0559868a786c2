"""Lineage of a model: the corpora and interactions that its run and the runs before it were trained on.

Each checkpoint stores it, so that a later run on another corpus or split can check whether its held-out interactions
were trained on (`leaks.py`). Interactions are identified by their keys (`corpus/pair_keys.py`), of which the smallest
are kept: all up to 2^20, beyond that a uniform sample, because keys are hashes. The samples of two runs can be merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cllm4rec_dist.config import StrictModel
from cllm4rec_dist.corpus.pair_keys import digest, id_hashes, pair_keys
from cllm4rec_dist.corpus.shards import NEW_USER_SPLITS, Corpus

SAMPLE_SIZE = 1 << 20
_LARGEST = (1 << 64) - 1


class Leak(StrictModel):
    """Held-out interactions of a run's corpus that the run, or one that it started from, was trained on."""

    num_interactions: int = Field(ge=1)
    """Number of them, validation and test together."""
    is_exact: bool
    """False if the number is estimated from a sample."""
    num_held_out: int = Field(ge=1)
    """Number of all held-out interactions of the corpus."""

    @property
    def count(self) -> str:
        """The number for messages: `12`, or `about 12` if it is estimated."""
        return f"{'' if self.is_exact else 'about '}{self.num_interactions:,}"


class Lineage(StrictModel):
    """The corpora that a model was trained on, as recorded in `state.json`."""

    train_digests: tuple[str, ...]
    """Digest of the training split of each corpus, that of the latest run first (see `Manifest.split_digests`)."""
    unknown: tuple[str, ...] = ()
    """Checkpoints that a run started from and that do not record what they were trained on."""
    leak: Leak | None = None
    """Held-out interactions of the run's corpus that the model was trained on, if `allow_leak` was set."""

    def notes(self) -> list[str]:
        """Return caveats that must be reported with this model's metrics."""
        notes = []
        if self.leak is not None:
            notes.append(f"trained on {self.leak.count} held-out interactions: the figures are not comparable")
        if self.unknown:
            notes.append(
                f"started from {', '.join(self.unknown)}: whether that was trained on held-out interactions"
                " is not known"
            )
        return notes


@dataclass(frozen=True)
class SeenInteractions:
    """A sample of the keys of training interactions.

    Attributes:
        keys: uint64 [n], distinct, ascending.
        bound: every interaction with a key up to this one is in the sample; 2^64 - 1 if the sample is complete.
    """

    keys: np.ndarray
    bound: int

    @classmethod
    def of(cls, keys: np.ndarray, bound: int = _LARGEST, size: int = SAMPLE_SIZE) -> SeenInteractions:
        """Keep the `size` smallest of `keys`, which are complete up to `bound`."""
        keys = np.unique(keys[keys <= np.uint64(bound)])
        if len(keys) > size:
            keys = keys[:size]
            bound = int(keys[-1])
        return cls(keys, bound)

    def __or__(self, other: SeenInteractions) -> SeenInteractions:
        """Merge two samples into the sample of their union."""
        return self.of(np.concatenate([self.keys, other.keys]), min(self.bound, other.bound))

    @property
    def is_complete(self) -> bool:
        """True if it holds all keys."""
        return self.bound == _LARGEST

    def contains(self, keys: np.ndarray) -> np.ndarray:
        """Return bool [n], True for each of `keys` that is in the sample."""
        if not len(self.keys):
            return np.zeros(len(keys), dtype=bool)
        index = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return self.keys[index] == keys

    def estimate(self, num_hits: int) -> int:
        """Estimate how many keys of a set were seen if `num_hits` of them are in the sample."""
        return round(num_hits * ((_LARGEST + 1) / (self.bound + 1)))

    def save(self, path: Path) -> None:
        """Write as safetensors."""
        save_file({"keys": self.keys, "bound": np.array([self.bound], dtype=np.uint64)}, path)

    @classmethod
    def load(cls, path: Path) -> SeenInteractions:
        """Read a file that `save` wrote.

        Raises:
            ValueError: for any other file.
        """
        try:
            arrays: dict[str, Any] = load_file(path)
            keys, bound = arrays["keys"], arrays["bound"]
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"is no sample of interactions ({error})") from error
        if not all(array.dtype == np.uint64 and array.ndim == 1 for array in (keys, bound)) or len(bound) != 1:
            raise ValueError("has arrays of other types or shapes than a sample of interactions")
        if (keys[1:] <= keys[:-1]).any() or (len(keys) and keys[-1] > bound[0]):
            raise ValueError("has keys that are not ascending up to its bound")
        return cls(keys, int(bound[0]))


@dataclass(frozen=True)
class TrainedOn:
    """Corpora that a model was trained on, and a sample of their interactions."""

    lineage: Lineage
    seen: SeenInteractions

    @classmethod
    def of_corpus(cls, corpus: Corpus) -> TrainedOn:
        """Return the lineage of a run that starts from no other run. Reads the training split."""
        (keys,) = corpus_keys(corpus, "train")
        train_digest = corpus.manifest.split_digests.get("train") or digest(keys)
        return cls(Lineage(train_digests=(train_digest,)), SeenInteractions.of(keys))

    def __or__(self, other: TrainedOn) -> TrainedOn:
        """Merge the lineages of two runs; `leak`, which is about one corpus, is dropped."""
        digests = dict.fromkeys((*self.lineage.train_digests, *other.lineage.train_digests))
        unknown = dict.fromkeys((*self.lineage.unknown, *other.lineage.unknown))
        return TrainedOn(Lineage(train_digests=tuple(digests), unknown=tuple(unknown)), self.seen | other.seen)


def corpus_keys(corpus: Corpus, *splits: str) -> list[np.ndarray]:
    """Return for each split the keys of its interactions, uint64 [N], users in the order of their rows."""
    users = id_hashes("user", corpus.ids("users")["user"].to_pylist())
    items = id_hashes("item", corpus.ids("items")["item"].to_pylist())
    return [pair_keys(users, items, corpus.split(split)) for split in splits]


def new_user_keys(corpus: Corpus) -> list[np.ndarray]:
    """Return the keys of each split of the new users, who are held out whole: histories, validation and test items."""
    users = id_hashes("user", corpus.new_users()["user"].to_pylist())
    items = id_hashes("item", corpus.ids("items")["item"].to_pylist())
    return [pair_keys(users, items, corpus.new_user_split(name)) for name in NEW_USER_SPLITS]
