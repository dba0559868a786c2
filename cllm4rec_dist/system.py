"""Assembles a run's parts: corpus, tokenizer, backbone in its engine, embedding tables, optimizers, fingerprints.

Training, evaluation and recommendation all use a system. `assemble` makes one that trains, on all ranks. One that only
predicts has no optimizer and no content LLM: `assemble_sharded_for_inference` makes it on all ranks,
`assemble_for_inference` in one process and without DeepSpeed, whose import alone takes longer than a small model's
prediction.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from cllm4rec_dist.config import BACKBONE_VECTORS, RunConfig
from cllm4rec_dist.config.embedding_width import embedding_width, require_not_wider
from cllm4rec_dist.corpus.prompts import PromptBuilder, largest_prompt_id
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.tokenizer import TokenSpace, WordTokenizer
from cllm4rec_dist.distributed.local_engine import ForwardEngine, LocalEngine
from cllm4rec_dist.distributed.topology import World, split_world
from cllm4rec_dist.errors import ConfigError, CorpusError
from cllm4rec_dist.model import backbone, embedding_init, hidden_vectors
from cllm4rec_dist.model.dtypes import DTYPES
from cllm4rec_dist.model.embedding_optimizer import EmbeddingOptimizer
from cllm4rec_dist.model.init_cache import InitCache
from cllm4rec_dist.model.item_features import local_item_counts
from cllm4rec_dist.model.linear_memory import LinearMemory
from cllm4rec_dist.model.new_items import NewItems
from cllm4rec_dist.model.probe import require_equal_to_transformers
from cllm4rec_dist.model.recommender import Recommender
from cllm4rec_dist.model.shared_words import load_shared_words

if TYPE_CHECKING:
    from cllm4rec_dist.distributed.engine import Engine

logger = logging.getLogger(__name__)

_PROBE_TEXT = "The title of the product that the customer will buy next, with the words of a review: it is very good."
_READ_BY_PREDICTIONS = ("users", "items", "interactions", "new_users")
"""Kinds of corpus files that predictions read."""
_PROMPT_ROOM = 64
"""Positions reserved for the words of a prompt; the longest template has about ten words."""


@dataclass(frozen=True)
class InferenceSystem:
    """Everything that a prediction needs.

    Attributes:
        linear: empty unless it was fitted (`train.py`) or read from a checkpoint.
        fingerprints: fingerprints of backbone, corpus and tokenizer, which checkpoints store.
        new_items: items after those of the corpus, which predictions may read and rank; None for none.
    """

    config: RunConfig
    world: World
    corpus: Corpus
    prompts: PromptBuilder
    recommender: Recommender
    linear: LinearMemory
    engine: ForwardEngine
    fingerprints: dict[str, str]
    _: KW_ONLY
    new_items: NewItems | None = None

    @property
    def num_items(self) -> int:
        """Items of the corpus and new items."""
        return self.corpus.num_items + (0 if self.new_items is None else len(self.new_items))

    def backbone(self, tokens: Tensor, positions: Tensor, content_start: int) -> Tensor:
        """Hidden states of packed embeddings (`DualBackbone.forward`). Gathers the backbone's weights."""
        with self.world.watch.collective("ZeRO-3 forward"):
            return self.engine(tokens, positions, content_start)

    def train(self, mode: bool) -> None:
        """Switch dropout on or off everywhere."""
        self.recommender.train(mode)
        self.engine.train(mode)


@dataclass(frozen=True)
class System(InferenceSystem):
    """An inference system with what a training step needs."""

    engine: Engine
    embedding_optimizer: EmbeddingOptimizer


def assemble(config: RunConfig, world: World) -> System:
    """Open the corpus, shard the backbone, make tables of zeros. Collective.

    Raises:
        ConfigError, CorpusError: if parts do not fit each other, or the backbone computes packed documents in another
            way than transformers computes each alone (`model/probe.py`).
    """
    system = _assemble_sharded(config, world, trains=True)
    words, ratio = None, config.optimizer.words_lr_ratio
    if ratio > 0:
        model, num_words = system.recommender, system.prompts.space.num_words
        words = load_shared_words(system.corpus, num_words, model.item_partition, model.world, ratio)
    optimizer = EmbeddingOptimizer(system.recommender, config.optimizer.betas, config.optimizer.embeddings_state, words)
    return System(**vars(system), embedding_optimizer=optimizer)


def assemble_sharded_for_inference(config: RunConfig, world: World) -> InferenceSystem:
    """Like `assemble_for_inference`, sharded over all ranks by DeepSpeed. Collective."""
    return _assemble_sharded(config, world, trains=False)


def _assemble_sharded(config: RunConfig, world: World, *, trains: bool) -> InferenceSystem:
    """Assemble a system with an `Engine`; with the content LLM, if the run has one, only if it trains."""
    from cllm4rec_dist.distributed import engine  # imports DeepSpeed

    shards, replicas = split_world(world, config.embeddings.shard_group, config.faults.collective_timeout_seconds)
    corpus = _open_corpus(config.corpus, verify=world.is_main and (trains or _READ_BY_PREDICTIONS))
    folder, decoder, tokenizer = open_backbone(config, corpus)
    backbone.require_weights(folder, decoder)
    content = trains and uses_content(config, corpus)
    if content:
        backbone.require_head(folder, decoder, backbone.stored_weights(folder))
    if trains:
        require_embeddings(corpus, tokenizer, decoder.vocab_size)
    else:
        require_word_embeddings("the prompts", largest_prompt_id(tokenizer), decoder.vocab_size)
    settings = engine.resolve_settings(config)
    dtype = DTYPES[config.precision]
    with engine.sharded_loading(settings):
        dual = backbone.load_backbone(folder, config.adapter, dtype, config.seed, config.quantization)
    if config.activation_checkpointing:
        dual.enable_activation_checkpointing()
    words = backbone.load_frozen_embeddings(folder, dtype, world.device, head=content)
    with world.watch.collective("the probe"), engine.gathered_by_layer(dual, dual.layers, world.device):
        require_equal_to_transformers(dual, dual, words, folder, tokenizer.encode_batch([_PROBE_TEXT])[0])
    recommender = _empty_recommender(config, corpus, words, shards, replicas, content=content)
    if trains and config.head.num_negatives and config.head.negative_sampling == "popularity":
        counts = local_item_counts(corpus, recommender.item_partition, shards)
        recommender.cumulative_counts = np.cumsum(counts + 1)
    trained = [parameter for parameter in dual.parameters() if parameter.requires_grad]
    adapter_optimizer = torch.optim.AdamW(
        trained, lr=0.0, betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay
    )
    return InferenceSystem(
        config=config,
        world=world,
        corpus=corpus,
        prompts=_prompt_builder(config, corpus, tokenizer, words),
        recommender=recommender,
        linear=LinearMemory(recommender.item_partition, shards),
        engine=engine.Engine(dual, settings, adapter_optimizer, dual.layers),
        fingerprints=_fingerprints(folder, corpus, tokenizer, world),
    )


def assemble_for_inference(config: RunConfig, world: World) -> InferenceSystem:
    """Assemble a system that only predicts, in one process: no DeepSpeed, optimizer or content LLM.

    Only the corpus files that predictions read are verified.

    Args:
        world: one rank, whose device holds the whole model.

    Raises:
        ConfigError, CorpusError: if parts do not fit each other.
    """
    assert world.size == 1
    corpus = _open_corpus(config.corpus, verify=_READ_BY_PREDICTIONS)
    folder, decoder, tokenizer = open_backbone(config, corpus)
    backbone.require_weights(folder, decoder)
    dtype = DTYPES[config.precision]
    words = backbone.load_frozen_embeddings(folder, dtype, world.device, head=False)
    prompts = _prompt_builder(config, corpus, tokenizer, words)
    require_word_embeddings("the prompts", largest_prompt_id(tokenizer), decoder.vocab_size)
    dual = backbone.load_backbone(folder, config.adapter, dtype, config.seed, config.quantization)
    engine = LocalEngine(dual, world.device)
    require_equal_to_transformers(dual, engine, words, folder, tokenizer.encode_batch([_PROBE_TEXT])[0])
    recommender = _empty_recommender(config, corpus, words, world, None, content=False)
    return InferenceSystem(
        config=config,
        world=world,
        corpus=corpus,
        prompts=prompts,
        recommender=recommender,
        linear=LinearMemory(recommender.item_partition, world),
        engine=engine,
        fingerprints=_fingerprints(folder, corpus, tokenizer, world),
    )


def _open_corpus(url: str, verify: bool | Collection[str]) -> Corpus:
    corpus = Corpus.open(url, verify=verify)
    logger.info("opened corpus %s: %d users, %d items", url, corpus.num_users, corpus.num_items)
    return corpus


def _empty_recommender(
    config: RunConfig,
    corpus: Corpus,
    words: backbone.FrozenEmbeddings,
    shards: World,
    replicas: World | None,
    *,
    content: bool,
) -> Recommender:
    """Make a recommender whose tables are zero."""
    return Recommender(
        config.method.num_user_rows(corpus.num_users),
        corpus.num_items,
        words,
        config.head,
        shards,
        dropout=config.embeddings.dropout,
        comm_dtype=DTYPES[config.embeddings.comm_dtype],
        sparse_gradients=config.optimizer.sparse_embedding_updates,
        content=content,
        width=embedding_width(config.embeddings.dim, words.embedding.shape[1], corpus.num_users + corpus.num_items),
        replicas=replicas,
    )


def _prompt_builder(
    config: RunConfig, corpus: Corpus, tokenizer: WordTokenizer, words: backbone.FrozenEmbeddings
) -> PromptBuilder:
    space = TokenSpace(len(words.embedding), config.method.num_user_rows(corpus.num_users), corpus.num_items)
    return PromptBuilder(tokenizer, space, config.method, config.seed, config.stage)


def _fingerprints(folder: Path, corpus: Corpus, tokenizer: WordTokenizer, world: World) -> dict[str, str]:
    return {
        "backbone": backbone.fingerprint_on_each_host(folder, world),
        "corpus": corpus.fingerprint,
        "tokenizer": tokenizer.fingerprint,
    }


def open_backbone(
    config: RunConfig, corpus: Corpus, *, weights: bool = True
) -> tuple[Path, PretrainedConfig, WordTokenizer]:
    """Return a backbone's folder, configuration and tokenizer.

    Args:
        weights: download the weights of a hub id; they are not read here.

    Raises:
        ConfigError, CorpusError: if the backbone cannot be used, or does not fit the run or the corpus.
    """
    folder = backbone.local_folder(config.backbone, weights=weights)
    decoder = backbone.load_config(folder)
    backbone.require_targets(decoder, config.adapter)
    backbone.require_adaptable(decoder, config.adapter, config.quantization)
    require_not_wider(config.embeddings, decoder.hidden_size)
    tokenizer = WordTokenizer.load(folder)
    if corpus.manifest.tokenizer_fingerprint != tokenizer.fingerprint:
        raise CorpusError(
            f"{config.corpus}: tokenizer",
            corpus.manifest.tokenizer_fingerprint,
            f"is not the backbone's, {tokenizer.fingerprint}",
            "Build the corpus again with this backbone's tokenizer.",
        )
    max_positions = backbone.max_positions(decoder)
    for field, length in (
        ("method.max_history", config.method.max_history),
        (f"{config.corpus}: max_text_tokens", corpus.manifest.preparation.max_text_tokens),
    ):
        if length + _PROMPT_ROOM > max_positions:
            raise ConfigError(
                field,
                length,
                f"with its prompt exceeds the backbone's {max_positions} positions",
                f"Set it to {max_positions - _PROMPT_ROOM} or less.",
            )
        backbone.require_static_rotary(decoder, field, length, _PROMPT_ROOM)
    return folder, decoder, tokenizer


def uses_content(config: RunConfig, corpus: Corpus) -> bool:
    """True if the run has a content LLM, which needs texts and a language-model head."""
    return config.batch.texts > 0 and corpus.content.num_examples > 0


def require_embeddings(corpus: Corpus, tokenizer: WordTokenizer, num_words: int) -> None:
    """Refuse prompts and texts with a token that has no word embedding.

    A tokenizer may have tokens that were added without resizing the model; their ids would be read as users. Texts are
    read only if the tokenizer has such tokens.

    Raises:
        ConfigError: names the token.
    """
    if tokenizer.largest_id < num_words:
        return
    records = (corpus.content.read_record(index, ("offsets", "tokens")) for index in range(len(corpus.content)))
    largest_in_texts = max((int(record["tokens"].max(initial=-1)) for record in records), default=-1)
    require_word_embeddings("the prompts", largest_prompt_id(tokenizer), num_words)
    require_word_embeddings(f"the texts of {corpus.url}", largest_in_texts, num_words)


def require_word_embeddings(where: str, token_id: int, num_words: int) -> None:
    """Refuse a tokenizer whose largest token in `where` has no word embedding."""
    if token_id >= num_words:
        raise ConfigError(
            "backbone: vocab_size",
            num_words,
            f"word embeddings, but {where} use token {token_id} of the tokenizer",
            "Resize the model and save it again (model.resize_token_embeddings(len(tokenizer))), or build the"
            " corpus with the tokenizer that the model was trained with.",
        )


def without_missing_deepspeed_file(config: RunConfig) -> RunConfig:
    """Replace a DeepSpeed file that does not exist by the package's, for evaluation and recommendation.

    It does not affect predictions. Training never falls back, because memory and traffic depend on the file.
    """
    if config.deepspeed is None or Path(config.deepspeed).is_file():
        return config
    logger.info("the run's DeepSpeed file %s does not exist: using the package's", config.deepspeed)
    return config.model_copy(update={"deepspeed": None})


def init_embeddings(system: System, *, items: bool = True) -> None:
    """Fill the tables of a new run (see `model/embedding_init.py`). Collective.

    Args:
        items: False leaves out the spectral initialization of the items, for a caller that replaces all of their rows.
    """
    config, model = system.config, system.recommender
    scale, shards = model.words.scale, model.world
    embedding_init.init_prior(model.collaborative.items, scale, shards, config.seed, 0)
    if items and config.embeddings.init == "spectral":
        factors = embedding_init.spectral_item_factors(
            system.corpus,
            config.embeddings,
            system.prompts.space.num_words,
            model.collaborative.items.width,
            model.item_partition,
            shards,
            config.seed,
            vectors=_text_vectors(system),
            cache=InitCache(config.corpus, config.output, system.world, shards),
        )
        embedding_init.init_items(model.collaborative.items, factors, scale, config.seed)
    embedding_init.init_prior(model.collaborative.users, scale, shards, config.seed, 1)
    if model.input_projection is not None:
        embedding_init.init_input_projection(model.input_projection, system.world, config.seed)
    init_content_embeddings(system)


def init_content_embeddings(system: System) -> None:
    """Draw content rows, if there are any, around the collaborative ones. No collective."""
    config, model = system.config, system.recommender
    if model.content is None:
        return
    pairs = (model.content.items, model.collaborative.items), (model.content.users, model.collaborative.users)
    for index, (content, collaborative) in enumerate(pairs, start=2):
        embedding_init.init_content(
            content, collaborative, config.embeddings, model.words.scale, model.world, config.seed, index
        )


def _text_vectors(system: System) -> embedding_init.TextVectors | None:
    """Return the source of dense vectors that the run's settings name."""
    source = system.config.embeddings.item_vectors
    if source is None:
        return None
    if source == BACKBONE_VECTORS:
        return _backbone_vectors(system)
    model = system.recommender
    return embedding_init.vectors_from_file(source, system.corpus, model.item_partition, model.world)


def _backbone_vectors(system: System) -> embedding_init.TextVectors:
    """Hidden states of the item texts after the middle layer of the backbone, before it or its adapters are trained."""
    config, model, words = system.config, system.recommender, system.recommender.words.embedding
    layers = system.engine.layers
    middle = max(0, len(layers) // 2 - 1)

    @torch.no_grad()
    def encode(word_ids: Tensor, positions: Tensor) -> Tensor:
        with hidden_vectors.recorded_output(layers[middle]) as outputs:
            embedded = F.embedding(word_ids, words)
            system.backbone(embedded, positions, word_ids.numel())
        return outputs[0].view_as(embedded)

    def compute() -> Tensor:
        system.train(False)
        texts = hidden_vectors.local_item_texts(system.corpus, model.item_partition, model.world)
        return hidden_vectors.mean_hidden_states(texts, words.shape[1], encode, model.world)

    digest = f"{system.fingerprints['backbone']} layer {middle} {config.precision} {config.quantization}"
    return embedding_init.TextVectors(digest, compute)
