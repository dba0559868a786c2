"""What is exported: a run's best checkpoint with its backbone and, where it is at hand, its corpus. Refuses here.

Read from the checkpoint's files alone, by one process and without building the run's model: the ranks' slices are put
together tensor by tensor.

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
from cllm4rec_dist.checkpointing.format import ADAPTER, Checkpoint
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.tokenizer import WordTokenizer
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CheckpointError, CorpusError
from cllm4rec_dist.evaluation.trained_run import log_choice, recorded_config
from cllm4rec_dist.model.backbone import COLLABORATIVE, CONTENT, fingerprint, load_config, local_folder

logger = logging.getLogger(__name__)

SHARED_USER = "shared_user"


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes:
        run: the run or checkpoint as it was given.
        opened: the checkpoint.
        config: its configuration, with the paths of corpus and backbone as they are now.
        corpus: the corpus, where it is at hand and the checkpoint's.
        backbone: folder of the backbone.
        base_model: hub id of the backbone; None for a folder that is from no hub.
        decoder: the backbone's configuration.
        tokenizer: the backbone's.
        tensors: what the engine trains, whole, by the names that it has there.
        tables: rows and item head, see `read_tables`.
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
        """LLMs that were trained. Without texts the content LLM has an adapter too, as it started."""
        return [llm for llm in (COLLABORATIVE, CONTENT) if f"{llm}.items" in self.tables]


def open_source(
    run: str, backbone: str | None, corpus: str | None, *, base_model: str | None = None, needs_corpus: bool = False
) -> Source:
    """Open a run's best checkpoint and everything that belongs to it.

    Args:
        backbone: where it is now, if not where the checkpoint says.
        corpus: a corpus that must be the run's. If left out, that of the checkpoint is used where it still is.
        base_model: hub id of the backbone, where neither `backbone` nor the checkpoint says it.
        needs_corpus: refuse a run whose corpus is not at hand.

    Raises:
        CheckpointError: where no checkpoint is whole, or the backbone or the corpus is another one.
        ConfigError: where the backbone is gone.
        CorpusError: where a needed corpus is gone.
    """
    store, names = find(run)
    world = World(0, 1, 0, torch.device("cpu"))
    found = checkpoint.load_first_valid(store, names, world, lambda opened: (_tensors(opened), read_tables(opened)))
    if found is None:
        raise checkpoint.all_damaged(run, store, names)
    opened, (tensors, tables) = found
    in_project = corpus_in_project(opened.store, opened.metadata.fingerprints.get("corpus"))
    # The recorded path even if it is gone: a corpus is not needed for everything.
    config = recorded_config(opened, backbone, corpus or in_project or str(opened.metadata.config["corpus"]))
    folder = local_folder(config.backbone)
    decoder = load_config(folder)  # refuses a backbone that cannot be used
    tokenizer = WordTokenizer.load(folder)
    checkpoint.require_same_fingerprints(opened, {"backbone": fingerprint(folder), "tokenizer": tokenizer.fingerprint})
    found_corpus = _open_corpus(opened, config.corpus, required=needs_corpus or corpus is not None)
    log_choice(store, names, opened)
    candidates = (base_model, config.backbone, str(opened.metadata.config["backbone"]))
    return Source(
        run=run,
        opened=opened,
        config=config,
        corpus=found_corpus,
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
        logger.warning("without titles, which are the corpus'; to have them, give --corpus PATH (%s)", error)
        return None
    return corpus


def _is_hub_id(name: str) -> bool:
    """True for what `local_folder` looks for on the hub."""
    return not Path(name).expanduser().is_dir() and name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _tensors(opened: Checkpoint) -> dict[str, Tensor]:
    """What the engine trains, whole, under the names that it has there."""
    found: dict[str, Tensor] = {}
    for name, shape in opened.metadata.shapes.items():
        flat = opened.rows(ADAPTER + name, math.prod(shape), 0, math.prod(shape))
        if flat is None:
            raise CheckpointError(opened.path, name, "is missing", "Use another checkpoint.")
        found[name] = flat.reshape(shape)
    return found


def read_tables(opened: Checkpoint) -> dict[str, Tensor]:
    """User and item rows, and the parameters of the item head, whole and in fp32.

    Returns:
        collaborative.users [U, D], collaborative.items [I, D]: rows in the order of users.parquet and items.parquet.
        content.users [U, D], content.items [I, D]: likewise, where the run has a content LLM.
        collaborative.shared_user, content.shared_user [1, D]: for anyone without a row of their own; zero where the run
            has trained no such row.
        head.bias [I], head.temperature []: where the run has them.
    """
    about = opened.metadata
    found: dict[str, Tensor] = {}
    for llm in (COLLABORATIVE, CONTENT):
        users = opened.rows(f"{llm}.users", about.num_user_rows, 0, about.num_user_rows)
        items = opened.rows(f"{llm}.items", about.num_items, 0, about.num_items)
        if users is None or items is None:
            continue
        found |= {f"{llm}.users": users[: about.num_users], f"{llm}.items": items}
        shared = users[about.num_users :] if about.has_shared_user else torch.zeros_like(users[:1])
        found[f"{llm}.{SHARED_USER}"] = shared.clone()  # safetensors stores no memory under two names
    bias = opened.rows("head.bias", about.num_items, 0, about.num_items)
    if bias is not None:
        found["head.bias"] = bias.flatten()
    log_temperature = opened.replicated().get("head.log_temperature")
    if log_temperature is not None:
        found["head.temperature"] = log_temperature.exp()
    return found
