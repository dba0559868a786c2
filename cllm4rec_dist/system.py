"""A run's parts, put together once: corpus, tokenizer, backbone in its engine, rows, optimizers, fingerprints.

Training, evaluation and recommendation all work on a `System`; none builds a model of its own.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.prompts import Composer
from cllm4rec_dist.corpus.shards import ContentKind, Corpus
from cllm4rec_dist.corpus.tokenizer import TokenSpace, WordTokenizer
from cllm4rec_dist.engine import Engine, resolve_settings, sharded_loading
from cllm4rec_dist.errors import ConfigError, CorpusError
from cllm4rec_dist.model import backbone, rows
from cllm4rec_dist.model.recommender import Recommender
from cllm4rec_dist.model.table_optimizer import TableOptimizer
from cllm4rec_dist.topology import World

logger = logging.getLogger(__name__)

_PROMPT_ROOM = 64
"""Positions kept for the words of a prompt; the longest template has some ten words."""

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class System:
    """Everything a step, an evaluation or a checkpoint needs.

    Attributes:
        fingerprints: of backbone, corpus and tokenizer; a checkpoint carries them.
    """

    config: RunConfig
    world: World
    corpus: Corpus
    composer: Composer
    recommender: Recommender
    engine: Engine
    table_optimizer: TableOptimizer
    fingerprints: dict[str, str]

    def train(self, mode: bool) -> None:
        """Switch dropout on or off everywhere."""
        self.recommender.train(mode)
        self.engine.train(mode)


def assemble(config: RunConfig, world: World) -> System:
    """Open the corpus, shard the backbone, make empty tables. Collective.

    Raises:
        ConfigError, CorpusError: where parts do not fit each other.
    """
    corpus = Corpus.open(config.corpus, verify=world.is_main)
    folder = backbone.local_folder(config.backbone)
    decoder = backbone.load_config(folder)
    backbone.require_weights(folder, decoder)
    tokenizer = WordTokenizer.load(folder)
    fingerprints = {
        "backbone": backbone.fingerprint(folder),
        "corpus": corpus.fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }
    if corpus.manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise CorpusError(
            f"{config.corpus}: tokenizer",
            corpus.manifest.tokenizer_fingerprint,
            f"is not the backbone's, {tokenizer.fingerprint}",
            "Build the corpus again with this backbone's tokenizer.",
        )
    positions = backbone.positions(decoder)
    for field, length in (
        ("method.max_history", config.method.max_history),
        (f"{config.corpus}: max_text_tokens", corpus.manifest.preparation.max_text_tokens),
    ):
        if length + _PROMPT_ROOM > positions:
            raise ConfigError(
                field,
                length,
                f"with its prompt passes the backbone's {positions} positions",
                f"Set it to {positions - _PROMPT_ROOM} or less.",
            )
    settings = resolve_settings(config)
    dtype = _DTYPES[config.precision]
    with sharded_loading(settings):
        dual = backbone.load_backbone(folder, config.adapter, dtype, config.seed, config.quantization)
    if config.activation_checkpointing:
        dual.enable_activation_checkpointing()
    words = backbone.load_words(folder, dtype, world.device)
    recommender = Recommender(
        corpus.num_users, corpus.num_items, words, config.head, world,
        dropout=config.rows.dropout, wire=_DTYPES[config.rows.wire], lazy=config.optimizer.lazy_tables,
        content=config.batch.texts > 0 and corpus.content.num_examples > 0,
    )  # fmt: skip
    trained = [parameter for parameter in dual.parameters() if parameter.requires_grad]
    adapter_optimizer = torch.optim.AdamW(
        trained, lr=0.0, betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay
    )
    space = TokenSpace(len(words.embedding), corpus.num_users, corpus.num_items)
    return System(
        config=config,
        world=world,
        corpus=corpus,
        composer=Composer(tokenizer, space, config.method, config.seed),
        recommender=recommender,
        engine=Engine(dual, settings, adapter_optimizer, dual.layers),
        table_optimizer=TableOptimizer(recommender, config.optimizer.betas, config.optimizer.table_state),
        fingerprints=fingerprints,
    )


def start_rows(system: System) -> None:
    """Fill the tables for a new run (see `model/rows.py`). Collective; the centre is computed on rank 0."""
    config, world, model = system.config, system.world, system.recommender
    scale = model.words.scale
    centre = None
    if world.is_main and config.rows.start != "prior":
        logger.info("computing the %s start of %d item rows", config.rows.start, system.corpus.num_items)
        width = model.words.embedding.shape[1]
        centre = rows.item_centre(
            interaction_matrix(system.corpus, "train"), word_counts(system.corpus, system.composer.space),
            config.rows.text_weight, width, config.seed,
        )  # fmt: skip
    if config.rows.start == "prior":
        rows.start_prior(model.collaborative.items, scale, world, config.seed, 0)
    else:
        rows.start_items(model.collaborative.items, centre, scale, world, config.seed)
    rows.start_prior(model.collaborative.users, scale, world, config.seed, 1)
    if model.content is not None:
        for index, (content, own) in enumerate(
            [(model.content.items, model.collaborative.items), (model.content.users, model.collaborative.users)],
            start=2,
        ):
            rows.start_content(content, own, config.rows, scale, world, config.seed, index)


def interaction_matrix(corpus: Corpus, split: str) -> sp.csr_matrix:
    """Binary [U, I] matrix of a split, fp32."""
    ragged = corpus.split(split)
    ones = np.ones(len(ragged.values), dtype=np.float32)
    return sp.csr_matrix((ones, ragged.values, ragged.offsets), shape=(corpus.num_users, corpus.num_items))


def word_counts(corpus: Corpus, space: TokenSpace) -> sp.csr_matrix:
    """How often each word stands in the texts about each item, [I, V] fp32; reviews of the training split included."""
    items, words = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for index in range(len(corpus.content.record_sizes)):
        record = corpus.content.read_record(index)
        about = np.where(record["kind"] == ContentKind.USER_PROFILE, corpus.num_items, record["items"])
        items.append(np.repeat(about, np.diff(record["offsets"])))
        words.append(record["tokens"].astype(np.int64))
    rows_, columns = np.concatenate(items), np.concatenate(words)
    known = rows_ < corpus.num_items
    ones = np.ones(int(known.sum()), dtype=np.float32)
    shape = (corpus.num_items, space.num_words)
    return sp.coo_matrix((ones, (rows_[known], columns[known])), shape=shape).tocsr()
