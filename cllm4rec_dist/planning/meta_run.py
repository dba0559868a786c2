"""A run's parts as on one of its ranks, built on the meta device without starting anything."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.config.embedding_width import embedding_width
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed import engine
from cllm4rec_dist.distributed.topology import RowPartition, World, shard_group_size
from cllm4rec_dist.model import backbone
from cllm4rec_dist.model.architecture import logit_transform, meta_language_model, word_layers
from cllm4rec_dist.model.backbone import DualBackbone, FrozenEmbeddings
from cllm4rec_dist.model.dtypes import DTYPES
from cllm4rec_dist.model.recommender import Recommender
from cllm4rec_dist.model.shared_words import local_item_words
from cllm4rec_dist.planning.dry_run import META
from cllm4rec_dist.planning.zero3_simulation import Zero3Settings, Zero3Simulation

_UNSUPPORTED = {
    "zero_quantized_weights": False,
    "zero_quantized_gradients": False,
    "zero_quantized_nontrainable_weights": False,
    "use_all_reduce_for_fetch_params": False,
}
"""ZeRO settings whose effect on communication a plan does not include, and their defaults."""


@dataclass(frozen=True)
class SharedWordsSize:
    """Size of rank 0's part of `model/shared_words.py`; nothing is shared by default.

    Attributes:
        num_words: words that items share.
        num_entries: pairs of an item of rank 0 and one of these words.
    """

    num_words: int = 0
    num_entries: int = 0


@dataclass(frozen=True)
class MetaRun:
    """The parts of a run on rank 0, which has the largest part of the tables.

    Attributes:
        dual: module of the engine.
        model: tables, head and words; tables have the rows of rank 0.
        zero: simulation of ZeRO-3 for `dual`.
        num_groups: number of flat groups of ZeRO-3's optimizer.
        offload_optimizer, offload_weights: True if they are in host memory.
        left_out: ZeRO settings that the plan does not include.
        shared_words: size of the words that items share.
    """

    config: RunConfig
    num_ranks: int
    dual: DualBackbone
    model: Recommender
    zero: Zero3Simulation
    num_groups: int
    contiguous_gradients: bool
    offload_optimizer: bool
    offload_weights: bool
    left_out: list[str]
    shared_words: SharedWordsSize = SharedWordsSize()

    @property
    def num_shards(self) -> int:
        """Number of ranks that together hold a copy of the tables."""
        return shard_group_size(self.config.embeddings.shard_group, self.num_ranks)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the backbone."""
        return DTYPES[self.config.precision]

    @property
    def trained(self) -> list[nn.Parameter]:
        """Parameters that the engine trains."""
        return [p for p in self.zero.parameters if p.requires_grad]


def make_meta_run(
    config: RunConfig,
    num_users: int,
    num_items: int,
    has_texts: bool,
    num_ranks: int,
    max_logits: int,
    hpz: int | None = None,
    shared_words: SharedWordsSize | None = None,
) -> MetaRun:
    """Build a run on the meta device from its configuration and the sizes of its corpus.

    Args:
        max_logits: logits that a head holds at a time.
        hpz: ranks of a group of hpZ; those of the DeepSpeed file if None.
        shared_words: size of the words that items share; none if None.

    Raises:
        ConfigError: for an invalid backbone or DeepSpeed file, as in a run.
    """
    decoder = backbone.load_config(backbone.local_folder(config.backbone, weights=False))
    dtype = DTYPES[config.precision]
    dual = backbone.meta_backbone(decoder, config.adapter, dtype)
    dual.train()
    if config.activation_checkpointing:
        dual.enable_activation_checkpointing()
    content = config.batch.texts > 0 and has_texts
    num_shards = shard_group_size(config.embeddings.shard_group, num_ranks)
    model = Recommender(
        RowPartition(config.method.num_user_rows(num_users), num_shards).block,
        RowPartition(num_items, num_shards).block,
        _words(decoder, dtype, content),
        config.head,
        World(0, 1, 0, META),
        dropout=config.embeddings.dropout,
        comm_dtype=DTYPES[config.embeddings.comm_dtype],
        sparse_gradients=config.optimizer.sparse_embedding_updates,
        content=content,
        width=embedding_width(config.embeddings.dim, decoder.hidden_size, num_users + num_items),
        max_logits=max_logits,
    )
    rules = engine.zero_config(engine.resolve_settings(config))
    settings = Zero3Settings(
        int(rules.prefetch_bucket_size),
        int(rules.max_reuse_distance),
        int(rules.max_live_parameters),
        int(rules.param_persistence_threshold),
        int(rules.model_persistence_threshold),
        int(rules.reduce_bucket_size),
        int(rules.sub_group_size),
        min(num_ranks, int(hpz or rules.zero_hpz_partition_size)),
    )
    zero = Zero3Simulation(dual, dual.layers, num_ranks, settings, _packed(dual, config, dtype))
    return MetaRun(
        config,
        num_ranks,
        dual,
        model,
        zero,
        _num_groups(zero),
        bool(rules.contiguous_gradients),
        _is_offloaded(rules.offload_optimizer),
        _is_offloaded(rules.offload_param),
        [name for name, default in _UNSUPPORTED.items() if getattr(rules, name) != default],
        shared_words or SharedWordsSize(),
    )


def measure_shared_words(config: RunConfig, corpus: Corpus, num_words: int, num_ranks: int) -> SharedWordsSize:
    """Read the texts of a corpus and count the words that its items share, if the run shares updates.

    Args:
        num_words: words of the backbone.
    """
    if not config.optimizer.words_lr_ratio:
        return SharedWordsSize()
    words = local_item_words(corpus, num_words, RowPartition(corpus.num_items, 1), World(0, 1, 0, torch.device("cpu")))
    num_shards = shard_group_size(config.embeddings.shard_group, num_ranks)
    rows = RowPartition(corpus.num_items, num_shards).block
    return SharedWordsSize(words.shape[1], words[:rows].nnz)


def _words(decoder: PretrainedConfig, dtype: torch.dtype, content: bool) -> FrozenEmbeddings:
    """Frozen embeddings of the sizes that `load_frozen_embeddings` reads."""
    model = meta_language_model(decoder)
    layers = word_layers(model)
    weight = torch.empty(layers.embedding.weight.shape, dtype=dtype, device=META)
    embedding = weight if type(layers.embedding) is nn.Embedding else torch.empty_like(weight)
    if not content:
        return FrozenEmbeddings(embedding, embedding[:0])
    head = weight if decoder.tie_word_embeddings else torch.empty_like(weight)
    if layers.head.bias is not None:
        head = torch.cat([head, head[:, :1]], dim=1)
    return FrozenEmbeddings(embedding, head, logit_transform(decoder))


def _packed(dual: DualBackbone, config: RunConfig, dtype: torch.dtype) -> dict[nn.Parameter, int]:
    """Number of `dtype` elements that store each 4-bit weight; a byte stores two 4-bit values."""
    if config.quantization == "none":
        return {}
    matrices = (p for p in dual.parameters() if p.dim() == 2 and not p.requires_grad)
    tables = {id(m.weight) for m in dual.modules() if isinstance(m, nn.Embedding)}
    return {p: p.numel() // (2 * dtype.itemsize) for p in matrices if id(p) not in tables}


def _num_groups(zero: Zero3Simulation) -> int:
    """Number of flat groups of ZeRO-3's optimizer."""
    groups, numel = 0, 0
    trained = [parameter for parameter in zero.parameters if parameter.requires_grad]
    for index, parameter in enumerate(trained):
        numel += zero.part(parameter)
        if numel >= zero.settings.sub_group or index == len(trained) - 1:
            groups, numel = groups + 1, 0
    return groups


def _is_offloaded(section: object) -> bool:
    return section is not None and str(getattr(section, "device", "none")).rsplit(".", 1)[-1] != "none"
