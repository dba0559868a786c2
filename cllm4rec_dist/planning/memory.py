"""Bytes that a rank needs, by part, at the moments of a step when it needs most.

Counted are tensors. What a GPU's driver and its kernels' workspaces take comes on top (`RESERVED`), and so does what an
allocator cannot use of its pieces.

Legend: V words, D width, W ranks.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from cllm4rec_dist.planning.gathering import Gathers
from cllm4rec_dist.planning.outline import Outline
from cllm4rec_dist.planning.rehearsal import ATTENTION, BACKBONE, GRADIENTS, HEAD, LOOKUP, WORD_HEAD, Rehearsal
from cllm4rec_dist.step import PIECE

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


def resident(outline: Outline) -> Memory:
    """What is there all the time."""
    zero, element = outline.zero, outline.dtype.itemsize
    frozen = [p for p in zero.parameters if not p.requires_grad]
    held: Memory = Counter()
    held["weights"] = _parts(outline, frozen, element) * (not outline.offload_weights) + _scales(outline)
    held["adapters"] = _parts(outline, outline.trained, element) * (not outline.offload_weights)
    if outline.num_ranks > 1:  # one rank alone copies nothing
        held["weights"] += zero.padded(p for p in zero.persistent if not p.requires_grad) * element
        held["adapters"] += zero.padded(p for p in zero.persistent if p.requires_grad) * element
    words = outline.model.words
    held["words"] = _bytes(words.embedding) + (0 if words.head is words.embedding else _bytes(words.head))
    held["tables"] = sum(map(_bytes, outline.model.parameters()))
    if not outline.offload_optimizer:
        held["optimizer"] = (1 + MOMENTS) * _parts(outline, outline.trained, FLOAT)
        held[GRADIENTS] = _parts(outline, outline.trained, element)
    held["optimizer"] += sum(_moments(outline, parameter) for parameter in outline.model.parameters())
    held["buffers"] = zero.settings.reduce_bucket * element * outline.contiguous_gradients
    return held


def _parts(outline: Outline, parameters: list[nn.Parameter], element: int) -> int:
    return sum(map(outline.zero.part, parameters)) * element


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _scales(outline: Outline) -> int:
    """Of 4-bit weights, not sharded: 8 bits for 64 entries, and one fp32 for 256 of those."""
    entries = sum(p.numel() for p in outline.zero.packed)
    return entries // 64 + entries // (64 * 256) * FLOAT


def _moments(outline: Outline, parameter: nn.Parameter) -> int:
    """`table_optimizer._make_moments`."""
    storage = outline.config.optimizer.embeddings_state
    if storage == "cpu":
        return 0
    if storage == "int8" and parameter.dim() == 2 and parameter.shape[1] > 1:
        return MOMENTS * (parameter.numel() + parameter.numel() // _SCALED_TOGETHER * FLOAT)
    return MOMENTS * _bytes(parameter)


def in_passes(outline: Outline, rehearsal: Rehearsal, gathers: Gathers) -> Memory:
    """On top of `resident`, at the fullest moment of forward and backward."""
    element = outline.dtype.itemsize * (outline.num_ranks > 1)
    whole = [0, *gathers.whole]
    moments = [
        Counter(stretch) + Counter({"gathered": numel * element})
        for stretch, numel in zip(rehearsal.stretches, whole, strict=True)
    ]
    moments += [
        Counter(alive) + Counter({"gathered": (numel + copied) * element})
        for alive, numel, copied in zip(rehearsal.at_events, gathers.whole, gathers.copied, strict=True)
    ]
    # What is reduced at the end of backward is copied into one piece once more.
    reduced = min(outline.zero.padded(outline.trained), outline.zero.settings.reduce_bucket) * outline.dtype.itemsize
    moments.append(Counter(rehearsal.left) + Counter({"buffers": reduced}))
    fullest = max(moments, key=lambda parts: parts.total())
    renamed = {BACKBONE: "activations", ATTENTION: "activations", HEAD: "heads", WORD_HEAD: "heads"}
    found: Memory = Counter()
    for part, size in fullest.items():
        found[renamed.get(part, part)] += size
    return found


def in_step(outline: Outline, rehearsal: Rehearsal) -> Memory:
    """On top of `resident`, when norms are taken and the optimizers step."""
    trained = _parts(outline, outline.trained, FLOAT) * (not outline.offload_optimizer)
    dense = rehearsal.left[GRADIENTS]
    squared = min(dense // FLOAT, PIECE) * 2 * DOUBLE
    return Counter({GRADIENTS: dense, "buffers": max(squared, 3 * trained)})
