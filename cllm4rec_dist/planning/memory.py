"""Bytes that a rank needs, by part, at the moments of a step when it needs most.

Counted are tensors. What a GPU's driver and its kernels' workspaces take comes on top (`RESERVED`), and so does what an
allocator cannot use of its pieces.

Legend: V words, D width, W ranks.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from cllm4rec_dist.planning.dry_run import ATTENTION, BACKBONE, GRADIENTS, HEAD, LOOKUP, WORD_HEAD, DryRun
from cllm4rec_dist.planning.meta_run import MetaRun
from cllm4rec_dist.planning.zero3_simulation import Gathers
from cllm4rec_dist.step import SQUARE_CHUNK

Memory = Counter[str]
"""Bytes by part."""

FLOAT, DOUBLE = 4, 8
MOMENTS = 2
_SCALED_TOGETHER = 64
"""Neighbouring entries that share a scale of 8-bit moments at the least."""
PARTS = {
    "weights": "frozen backbone: this rank's part, and small weights that stay whole",
    "words": "word embeddings and word head, one copy a rank",
    "adapters": "what the engine trains: this rank's part, and small weights that stay whole",
    "tables": "user and item rows of this rank, head's bias",
    "optimizer": "fp32 masters and Adam's moments",
    GRADIENTS: "of what the engine trains (this rank's part), and dense ones of tables",
    "activations": "what the backbone keeps for backward, or computes again",
    "heads": "queries of all ranks, a chunk of logits, the items' operand and its gradient",
    LOOKUP: "rows that were fetched, embeddings, their gradients",
    "gathered": "weights of the backbone that are whole for a moment",
    "buffers": "ZeRO-3's bucket of gradients and what its reduction copies",
}
"""What is counted as what."""


def resident(meta_run: MetaRun) -> Memory:
    """What is there all the time."""
    zero, element = meta_run.zero, meta_run.dtype.itemsize
    frozen = [p for p in zero.parameters if not p.requires_grad]
    held: Memory = Counter()
    held["weights"] = _parts(meta_run, frozen, element) * (not meta_run.offload_weights) + _scales(meta_run)
    held["adapters"] = _parts(meta_run, meta_run.trained, element) * (not meta_run.offload_weights)
    if meta_run.num_ranks > 1:  # one rank alone copies nothing
        held["weights"] += zero.padded(p for p in zero.persistent if not p.requires_grad) * element
        held["adapters"] += zero.padded(p for p in zero.persistent if p.requires_grad) * element
    words = meta_run.model.words
    held["words"] = _bytes(words.embedding) + (0 if words.head is words.embedding else _bytes(words.head))
    held["tables"] = sum(map(_bytes, meta_run.model.parameters()))
    if not meta_run.offload_optimizer:
        held["optimizer"] = (1 + MOMENTS) * _parts(meta_run, meta_run.trained, FLOAT)
        held[GRADIENTS] = _parts(meta_run, meta_run.trained, element)
    held["optimizer"] += sum(_moments(meta_run, parameter) for parameter in meta_run.model.parameters())
    held["buffers"] = zero.settings.reduce_bucket * element * meta_run.contiguous_gradients
    return held


def _parts(meta_run: MetaRun, parameters: list[nn.Parameter], element: int) -> int:
    return sum(map(meta_run.zero.part, parameters)) * element


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _scales(meta_run: MetaRun) -> int:
    """Of 4-bit weights, not sharded: 8 bits for 64 entries, and one fp32 for 256 of those."""
    entries = sum(p.numel() for p in meta_run.zero.packed)
    return entries // 64 + entries // (64 * 256) * FLOAT


def _moments(meta_run: MetaRun, parameter: nn.Parameter) -> int:
    """`embedding_optimizer._make_moments`."""
    storage = meta_run.config.optimizer.embeddings_state
    if storage == "cpu":
        return 0
    if storage == "int8" and parameter.dim() == 2 and parameter.shape[1] > 1:
        return MOMENTS * (parameter.numel() + parameter.numel() // _SCALED_TOGETHER * FLOAT)
    return MOMENTS * _bytes(parameter)


def in_passes(meta_run: MetaRun, traced: DryRun, gathers: Gathers) -> Memory:
    """On top of `resident`, at the fullest moment of forward and backward."""
    element = meta_run.dtype.itemsize * (meta_run.num_ranks > 1)
    whole = [0, *gathers.whole]
    moments = [
        Counter(stretch) + Counter({"gathered": numel * element})
        for stretch, numel in zip(traced.stretches, whole, strict=True)
    ]
    moments += [
        Counter(alive) + Counter({"gathered": (numel + copied) * element})
        for alive, numel, copied in zip(traced.at_events, gathers.whole, gathers.copied, strict=True)
    ]
    # What is reduced at the end of backward is copied into one piece once more.
    reduced = (
        min(meta_run.zero.padded(meta_run.trained), meta_run.zero.settings.reduce_bucket) * meta_run.dtype.itemsize
    )
    moments.append(Counter(traced.left) + Counter({"buffers": reduced}))
    fullest = max(moments, key=lambda parts: parts.total())
    renamed = {BACKBONE: "activations", ATTENTION: "activations", HEAD: "heads", WORD_HEAD: "heads"}
    found: Memory = Counter()
    for part, size in fullest.items():
        found[renamed.get(part, part)] += size
    return found


def in_step(meta_run: MetaRun, traced: DryRun) -> Memory:
    """On top of `resident`, when norms are taken and the optimizers step."""
    trained = _parts(meta_run, meta_run.trained, FLOAT) * (not meta_run.offload_optimizer)
    dense = traced.left[GRADIENTS]
    squared = min(dense // FLOAT, SQUARE_CHUNK) * 2 * DOUBLE
    return Counter({GRADIENTS: dense, "buffers": max(squared, 3 * trained)})
