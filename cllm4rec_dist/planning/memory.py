"""Bytes that a rank needs at its peak, by part.

Only tensors are counted. The GPU's driver, workspaces of kernels and fragmentation of the allocator come on top
(`plan.RESERVED`).

Legend: V words, D width, W ranks.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from cllm4rec_dist.planning.dry_run import ATTENTION, BACKBONE, GRADIENTS, HEAD, LOOKUP, META, WORD_HEAD, DryRun
from cllm4rec_dist.planning.meta_run import MetaRun
from cllm4rec_dist.planning.zero3_simulation import Gathers
from cllm4rec_dist.step import SQUARE_CHUNK

Memory = Counter[str]
"""Bytes by part."""

INDEX, FLOAT, DOUBLE, INTEGER = 4, 4, 8, 8
MOMENTS = 2
_MIN_QUANTIZATION_BLOCK = 64
"""Smallest block size of 8-bit moments."""
PARTS = {
    "weights": "frozen backbone: this rank's partition, that of hpZ, and small persistent weights",
    "words": "word embeddings and word head, one copy per rank",
    "adapters": "weights that the engine trains: this rank's partitions, and small persistent weights",
    "tables": "user and item rows of this rank, item bias, projections",
    "linear": "linear memory: its index of this rank's rows",
    "optimizer": "fp32 masters, Adam's moments, words of this rank's items that share updates",
    GRADIENTS: "of the engine (this rank's partition), and dense ones of tables",
    "activations": "what the backbone keeps for backward or recomputes",
    "heads": "queries of all ranks, a chunk of logits and of item rows, in backward the gradient of these rows",
    LOOKUP: "rows looked up, input embeddings, their gradients",
    "gathered": "gathered weights of the backbone",
    "buffers": "ZeRO-3's gradient bucket and copies for its reduction",
}
"""Parts, and what they contain."""


def resident(meta_run: MetaRun) -> Memory:
    """Bytes that are allocated all the time."""
    zero, element = meta_run.zero, meta_run.dtype.itemsize
    frozen = [p for p in zero.parameters if not p.requires_grad]
    held: Memory = Counter()
    held["weights"] = _parts(meta_run, frozen, element) * (not meta_run.offload_weights) + _scales(meta_run)
    held["adapters"] = _parts(meta_run, meta_run.trained, element) * (not meta_run.offload_weights)
    if meta_run.num_ranks > 1:  # with one rank there are no copies
        held["weights"] += zero.padded(p for p in zero.persistent if not p.requires_grad) * element
        held["adapters"] += zero.padded(p for p in zero.persistent if p.requires_grad) * element
    if zero.settings.hpz > 1:
        held["weights"] += zero.padded(frozen) // zero.settings.hpz * element
    words = meta_run.model.words
    held["words"] = _bytes(words.embedding) + (0 if words.head is words.embedding else _bytes(words.head))
    held["tables"] = sum(map(_bytes, meta_run.model.parameters()))
    if not meta_run.offload_optimizer:
        held["optimizer"] = (1 + MOMENTS) * _parts(meta_run, meta_run.trained, FLOAT)
        held[GRADIENTS] = _parts(meta_run, meta_run.trained, element)
    held["linear"] = _linear_memory(meta_run)
    held["optimizer"] += sum(_moments(meta_run, parameter) for parameter in meta_run.model.parameters())
    held["optimizer"] += _moments(meta_run, shared_word_parts(meta_run)) + _word_weights(meta_run)
    held["buffers"] = zero.settings.reduce_bucket * element * meta_run.contiguous_gradients
    return held


def until_step(meta_run: MetaRun) -> Memory:
    """Bytes that are allocated from the first pass to the end of the optimizer step: hpZ's partition of adapters."""
    zero = meta_run.zero
    if zero.settings.hpz == 1:
        return Counter()
    return Counter(adapters=zero.padded(meta_run.trained) // zero.settings.hpz * meta_run.dtype.itemsize)


def _linear_memory(meta_run: MetaRun) -> int:
    """Bytes of the index of the linear memory: a row and a weight for each neighbor, a start for each item of all."""
    num_neighbors = linear_neighbors(meta_run)
    if num_neighbors == 0:
        return 0
    num_rows = meta_run.model.item_partition.num_rows
    return num_rows * num_neighbors * (INDEX + FLOAT) + (num_rows * meta_run.num_shards + 2) * INTEGER


def linear_neighbors(meta_run: MetaRun) -> int:
    """Neighbors of each item in the linear memory; 0 without one."""
    if meta_run.config.stage != "finetune":
        return 0
    num_items = meta_run.model.item_partition.num_rows * meta_run.num_shards
    return min(meta_run.config.linear.num_neighbors(num_items), num_items - 1)


def shared_word_parts(meta_run: MetaRun) -> torch.Tensor:
    """Empty [V, d] fp32 of the parts of the words that items share."""
    return torch.empty(
        meta_run.shared_words.num_words, meta_run.model.collaborative.items.width, device=META, dtype=torch.float32
    )


def _word_weights(meta_run: MetaRun) -> int:
    """Bytes of `SharedWords`: two CSR matrices with int32 indices."""
    size = meta_run.shared_words
    if size.num_words == 0:
        return 0
    offsets = meta_run.model.item_partition.num_rows + size.num_words + 2
    return INDEX * offsets + 2 * size.num_entries * (INDEX + FLOAT)


def _parts(meta_run: MetaRun, parameters: list[nn.Parameter], element: int) -> int:
    return sum(map(meta_run.zero.part, parameters)) * element


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _scales(meta_run: MetaRun) -> int:
    """Bytes of the scales of 4-bit weights, which are not sharded: 8 bits per 64 entries, and fp32 per 256 scales."""
    entries = sum(p.numel() for p in meta_run.zero.packed)
    return entries // 64 + entries // (64 * 256) * FLOAT


def _moments(meta_run: MetaRun, parameter: torch.Tensor) -> int:
    """Bytes of the moments of `embedding_optimizer._make_moments`."""
    storage = meta_run.config.optimizer.embeddings_state
    if storage == "cpu":
        return 0
    if storage == "int8" and parameter.dim() == 2 and parameter.shape[1] > 1:
        return MOMENTS * (parameter.numel() + parameter.numel() // _MIN_QUANTIZATION_BLOCK * FLOAT)
    return MOMENTS * _bytes(parameter)


def in_passes(meta_run: MetaRun, traced: DryRun, gathers: Gathers) -> Memory:
    """Bytes on top of `resident` at the peak of forward and backward."""
    element = meta_run.dtype.itemsize * (meta_run.num_ranks > 1)
    gathered = [0, *gathers.gathered]
    moments = [
        Counter(peak) + Counter({"gathered": numel * element})
        for peak, numel in zip(traced.peaks, gathered, strict=True)
    ]
    moments += [
        Counter(alive) + Counter({"gathered": (numel + copied) * element})
        for alive, numel, copied in zip(traced.at_events, gathers.gathered, gathers.copied, strict=True)
    ]
    # The gradients that are reduced at the end of backward are copied once more.
    reduced = (
        min(meta_run.zero.padded(meta_run.trained), meta_run.zero.settings.reduce_bucket) * meta_run.dtype.itemsize
    )
    moments.append(Counter(traced.remaining) + Counter({"buffers": reduced}))
    fullest = max(moments, key=Counter.total)
    renamed = {BACKBONE: "activations", ATTENTION: "activations", HEAD: "heads", WORD_HEAD: "heads"}
    memory: Memory = Counter()
    for part, size in fullest.items():
        memory[renamed.get(part, part)] += size
    return memory


def in_step(meta_run: MetaRun, traced: DryRun) -> Memory:
    """Bytes on top of `resident` at the peak of clipping and optimizer step."""
    trained = _parts(meta_run, meta_run.trained, FLOAT) * (not meta_run.offload_optimizer)
    dense = traced.remaining[GRADIENTS]
    replicated_bytes = sum(_bytes(parameter) for _, parameter in meta_run.model.replicated_parameters())
    squared = min(dense // FLOAT, SQUARE_CHUNK) * 2 * DOUBLE
    copied = 2 * replicated_bytes * (meta_run.num_ranks > 1)
    words = 2 * _bytes(shared_word_parts(meta_run))  # gradient and update
    return Counter({GRADIENTS: dense, "buffers": max(squared, copied, 3 * trained, words)})
