"""Source of an export: a run's best checkpoint with its backbone and, if available, its corpus.

One process reads the checkpoint's files without building the model; the ranks' shards are assembled tensor by tensor.

Legend: U users, I items, D hidden.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig

from cllm4rec_dist.checkpointing import checkpoint
from cllm4rec_dist.checkpointing.find_run import corpus_in_project, find
from cllm4rec_dist.checkpointing.format import ADAPTER, LINEAR_NEIGHBORS, LINEAR_WEIGHTS, Checkpoint
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.tokenizer import WordTokenizer
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CheckpointError, CorpusError
from cllm4rec_dist.evaluation.cold_items import fill_rows
from cllm4rec_dist.evaluation.trained_run import log_choice, recorded_config
from cllm4rec_dist.model.backbone import COLLABORATIVE, CONTENT, fingerprint, load_config, local_folder

logger = logging.getLogger(__name__)

SHARED_USER = "shared_user"


@dataclass(frozen=True)
class Source:
    """Everything an export reads.

    Attributes:
        run: path of the run or checkpoint as given.
        opened: the checkpoint.
        config: its configuration, with the current paths of corpus and backbone.
        corpus: the corpus of the checkpoint; None if it is not available.
        backbone: folder of the backbone.
        base_model: hub id of the backbone; None for a local folder.
        decoder: configuration of the backbone.
        tokenizer: tokenizer of the backbone.
        tensors: full tensors trained by the engine, by the engine's parameter names.
        tables: embeddings and item head, see `read_tables`.
    """

    run: str
    opened: Checkpoint
    config: RunConfig
    corpus: Corpus | None
    backbone: Path
    base_model: str | None
    decoder: PretrainedConfig
    tokenizer: WordTokenizer
    tensors: dict[str, Tensor]
    tables: dict[str, Tensor]

    @property
    def llms(self) -> list[str]:
        """LLMs that were trained. Without texts the content LLM only has an untrained adapter."""
        return [llm for llm in (COLLABORATIVE, CONTENT) if f"{llm}.items" in self.tables]


def open_source(
    run: str,
    backbone: str | None,
    corpus: str | None,
    *,
    new_item_offset: float | None = None,
    base_model: str | None = None,
    needs_corpus: bool = False,
) -> Source:
    """Open a run's best checkpoint, its backbone and its corpus.

    Args:
        backbone: current path of the backbone, if it differs from the one in the checkpoint.
        corpus: path of a corpus that must be the run's. By default the recorded path is used if it still exists.
        new_item_offset: offset of the item biases of new items, instead of the run's.
        base_model: hub id of the backbone, if neither `backbone` nor the checkpoint has one.
        needs_corpus: raise if the corpus is not available.

    Raises:
        CheckpointError: if no checkpoint is intact, or the backbone or corpus has changed.
        ConfigError: if the backbone is missing.
        CorpusError: if a required corpus is missing.
    """
    store, names = find(run)
    world = World(0, 1, 0, torch.device("cpu"))
    loaded = checkpoint.load_first_valid(store, names, world, lambda opened: (_tensors(opened), read_tables(opened)))
    if loaded is None:
        raise checkpoint.all_damaged(run, store, names)
    opened, (tensors, tables) = loaded
    in_project = corpus_in_project(opened.store, opened.metadata.fingerprints.get("corpus"))
    # The recorded path even if it does not exist: a corpus is optional.
    corpus_path = corpus or in_project or str(opened.metadata.config["corpus"])
    config = recorded_config(opened, backbone, corpus_path, new_item_offset)
    folder = local_folder(config.backbone)
    decoder = load_config(folder)  # raises for an unusable backbone
    tokenizer = WordTokenizer.load(folder)
    checkpoint.require_same_fingerprints(opened, {"backbone": fingerprint(folder), "tokenizer": tokenizer.fingerprint})
    run_corpus = _open_corpus(opened, config.corpus, required=needs_corpus or corpus is not None)
    if run_corpus is not None and run_corpus.manifest.has_cold_items:  # as when the run is loaded
        bias, rows = tables.get("head.bias"), tables[f"{COLLABORATIVE}.items"]
        local_bias, offset = None if bias is None else bias[:, None], config.head.new_item_offset
        fill_rows(run_corpus, run_corpus.training_counts(), rows, local_bias, 0, world, offset)
    log_choice(store, names, opened)
    candidates = (base_model, config.backbone, str(opened.metadata.config["backbone"]))
    return Source(
        run=run,
        opened=opened,
        config=config,
        corpus=run_corpus,
        backbone=folder,
        base_model=next((name for name in candidates if name and _is_hub_id(name)), None),
        decoder=decoder,
        tokenizer=tokenizer,
        tensors=tensors,
        tables=tables,
    )


def _open_corpus(opened: Checkpoint, url: str, *, required: bool) -> Corpus | None:
    try:
        corpus = Corpus.open(url, verify=False)
        checkpoint.require_same_fingerprints(opened, {"corpus": corpus.fingerprint})
    except (CorpusError, CheckpointError) as error:
        if required:
            raise
        logger.warning(
            "no titles, because the corpus is not available; to include them, give --corpus PATH (%s)", error
        )
        return None
    return corpus


def _is_hub_id(name: str) -> bool:
    """True if `local_folder` treats the name as a hub id."""
    return not Path(name).expanduser().is_dir() and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _tensors(opened: Checkpoint) -> dict[str, Tensor]:
    """Full tensors trained by the engine, by the engine's parameter names."""
    tensors: dict[str, Tensor] = {}
    for name, shape in opened.metadata.shapes.items():
        flat = opened.rows(ADAPTER + name, math.prod(shape), 0, math.prod(shape))
        if flat is None:
            raise CheckpointError(opened.path, name, "is missing", "Use another checkpoint.")
        tensors[name] = flat.reshape(shape)
    return tensors


def read_tables(opened: Checkpoint) -> dict[str, Tensor]:
    """Read the full user and item embeddings, the parameters of the item head and the linear memory, in fp32.

    Returns:
        collaborative.users [U, D], collaborative.items [I, D]: rows in the order of users.parquet and items.parquet.
        content.users [U, D], content.items [I, D]: likewise, if the run has a content LLM.
        collaborative.shared_user, content.shared_user [1, D]: row for anyone without one; zero if the run has not
            trained it.
        head.bias [I], head.temperature [], head.projection [D, d], input_projection [d, D]: if the run has them.
        linear.neighbors [I, K] int32, linear.weights [I, K]: the linear memory, if its score is used.
    """
    about = opened.metadata
    tables: dict[str, Tensor] = {}
    for llm in (COLLABORATIVE, CONTENT):
        users = opened.rows(f"{llm}.users", about.num_user_rows, 0, about.num_user_rows)
        items = opened.rows(f"{llm}.items", about.num_items, 0, about.num_items)
        if users is None or items is None:
            continue
        tables |= {f"{llm}.users": users[: about.num_users], f"{llm}.items": items}
        shared = users[about.num_users :] if about.has_shared_user else torch.zeros_like(users[:1])
        tables[f"{llm}.{SHARED_USER}"] = shared.clone()  # safetensors does not store shared memory
    bias = opened.rows("head.bias", about.num_items, 0, about.num_items)
    if bias is not None:
        tables["head.bias"] = bias.flatten()
    replicated = opened.replicated()
    if "head.log_temperature" in replicated:
        tables["head.temperature"] = replicated["head.log_temperature"].exp()
    tables |= {name: replicated[name] for name in ("head.projection", "input_projection") if name in replicated}
    memory = opened.linear_memory(0, about.num_items) if about.run.linear_weight else None
    if memory is not None:
        tables |= dict(zip((LINEAR_NEIGHBORS, LINEAR_WEIGHTS), memory, strict=True))
    return tables
